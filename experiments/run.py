"""`make experiment`: data, features, runs, report. What is finished is not done again."""

from __future__ import annotations

import argparse
import fcntl
import functools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from experiments import prepare
from experiments.collect import collect, note_time
from experiments.contest import Contest, run, run_config
from experiments.report import write_report
from experiments.settings import load_settings
from lambda_return_ext.critic.files import write_json, write_text

STAGES = ("backbone", "rollouts", "programs", "features", "contests", "facts", "report")
SHARED = {"rollouts", "features", "contests"}  # the stages that several processes share


def contests(settings: Mapping[str, Any]) -> Iterator[Contest]:
    """All runs of the plan, seed by seed."""
    for part in settings["plan"]:
        for seed in range(part["seeds"]):
            for data_set in part["data_sets"]:
                for regime in settings["data_sets"][data_set]["regimes"]:
                    for contestant in part["contestants"]:
                        yield Contest(data_set, regime, contestant, seed)


def run_contests(settings: Mapping[str, Any]) -> None:
    """The runs that have no file yet and that no other process is making."""
    folder = Path(settings["folder"]) / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    features = functools.cache(functools.partial(prepare.load_features, settings))
    block_inputs = functools.cache(functools.partial(prepare.load_block_inputs, settings))
    base_model = functools.cache(functools.partial(prepare.base_model, settings))
    with (folder.parent / "runs.lock").open("w") as claims:  # one byte a run; what a killed process held is free again
        for number, contest in enumerate(contests(settings)):
            path = folder / f"{contest.name}.json"
            try:
                fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except OSError:
                continue
            if path.exists():
                continue
            data_set = settings["data_sets"][contest.data_set]
            train = data_set["regimes"][contest.regime]
            config = run_config(settings, contest, train)
            data = prepare.load_pairs(settings, contest.data_set, data_set["validation_problems"], train, contest.seed)
            programs = contest.data_set != "rollouts"
            with_block = prepare.trains_block(settings, [contest.contestant])
            known = (block_inputs if with_block else features)(contest.data_set)
            elsewhere = prepare.all_pairs(settings, "human_eval") if programs else []
            if programs:
                known = {**known, **features("human_eval")}
            base = base_model() if with_block else None
            result = run(settings, contest, config, data, known, elsewhere, base)
            write_text(path, json.dumps(result) + "\n")
            last = result["trace"][-1]["validation_pairwise_accuracy"]
            print(f"{contest.name}: {last:.3f} in {result['seconds']} s", flush=True)


def do_stage(stage: str, settings: Mapping[str, Any], part: int, parts: int) -> None:
    """One stage, or this process's share of it."""
    folder = Path(settings["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    if stage == "backbone":
        prepare.save_backbone(settings)
    elif stage == "rollouts":
        prepare.sample_rollouts(settings, part, parts)
    elif stage == "programs":
        prepare.pair_rollouts(settings)
        prepare.make_program_pairs(settings)
    elif stage == "features":
        for name in prepare.DATA_SETS[part::parts]:
            prepare.make_features(settings, name)
    elif stage == "contests":
        run_contests(settings)
    elif stage == "facts":
        facts = folder / "data.json"
        if not facts.exists():
            sets = [prepare.describe_pairs(settings, name) for name in prepare.DATA_SETS]
            write_json(facts, {"sets": sets, "likelihood": prepare.likelihood(settings, "rollouts")})
    else:
        collect(settings)
        write_report(settings)


def main() -> None:
    """Run all stages, or one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="half an hour at most instead of the full experiment")
    parser.add_argument("--stage", choices=STAGES, help="this one alone")
    parser.add_argument("--part", type=int, default=0, metavar="K", help="this process's share, from 0")
    parser.add_argument("--parts", type=int, metavar="N", help="processes that share a stage; with --stage, of which K")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = load_settings(arguments.quick)
    if arguments.stage:
        do_stage(arguments.stage, settings, arguments.part, arguments.parts or 1)
        return
    for stage in STAGES:
        parts, started = (arguments.parts or 2) if stage in SHARED else 1, time.monotonic()
        command = [sys.executable, "-m", "experiments.run", *["--quick"] * arguments.quick, "--stage", stage]
        running = [subprocess.Popen([*command, "--part", str(k), "--parts", str(parts)]) for k in range(parts)]
        if sum(process.wait() != 0 for process in running):  # waits for all
            raise SystemExit(f"the stage {stage!r} failed; the next `make experiment` goes on from there")
        seconds = time.monotonic() - started
        note_time(Path(settings["folder"]), stage, seconds, parts)
        print(f"the stage {stage!r} took {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
