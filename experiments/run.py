"""`make experiment`: data, features, runs, report. What is finished is not done again."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from experiments import prepare
from experiments.contest import Contest, run, run_config
from experiments.report import write_report
from lambda_return_ext.critic.checkpoint import write_json, write_text

STAGES = ("rollouts", "programs", "features", "contests", "report")
SHARED = {"rollouts", "features", "contests"}  # the stages that several processes share
SETTINGS = Path(__file__).with_name("settings.yaml")


def load_settings(quick: bool) -> dict[str, Any]:
    """The settings, for a quick run with what `quick` replaces."""
    settings = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    changes = settings.pop("quick")
    if quick:
        seeds, problems = changes.pop("seeds"), changes["rollouts"].pop("problems")
        merge(settings, changes)
        for part in settings["plan"]:
            part["seeds"] = min(part["seeds"], seeds)
        for family in settings["rollouts"]["families"].values():
            family["problems"] = min(family["problems"], problems)
    return settings


def merge(settings: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put `changes` into `settings`, mapping by mapping."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(settings.get(key), dict):
            merge(settings[key], value)
        else:
            settings[key] = value


def contests(settings: Mapping[str, Any]) -> Iterator[Contest]:
    """All runs of the plan, seed by seed."""
    for part in settings["plan"]:
        for seed in range(part["seeds"]):
            for data_set in part["data_sets"]:
                for regime in settings["data_sets"][data_set]["regimes"]:
                    for contestant in part["contestants"]:
                        yield Contest(data_set, regime, contestant, seed)


def run_contests(settings: Mapping[str, Any], part: int, parts: int) -> None:
    """The runs that have no file yet; each process begins elsewhere, and passes over what another has finished."""
    folder = Path(settings["folder"]) / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    loaded: dict[str, dict[Any, torch.Tensor]] = {}

    def features(name: str) -> dict[Any, torch.Tensor]:
        if name not in loaded:
            loaded[name] = prepare.load_features(settings, name)
        return loaded[name]

    order = list(contests(settings))
    start = part * len(order) // parts
    for contest in order[start:] + order[:start]:
        path = folder / f"{contest.name}.json"
        if path.exists():
            continue
        data_set = settings["data_sets"][contest.data_set]
        train = data_set["regimes"][contest.regime]
        config = run_config(settings, contest, train)
        data = prepare.load_pairs(settings, contest.data_set, data_set["validation_problems"], train, contest.seed)
        programs = contest.data_set != "rollouts"
        known = features(contest.data_set)
        elsewhere = prepare.all_pairs(settings, "human_eval") if programs else []
        if programs:
            known = {**known, **features("human_eval")}
        result = run(settings, contest, config, data, known, elsewhere)
        write_text(path, json.dumps(result) + "\n")
        last = result["trace"][-1]["validation_pairwise_accuracy"]
        print(f"{contest.name}: {last:.3f} in {result['seconds']} s", flush=True)


def do_stage(stage: str, settings: Mapping[str, Any], part: int, parts: int) -> None:
    """One stage, or this process's share of it."""
    folder = Path(settings["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    if stage == "rollouts":
        prepare.sample_rollouts(settings, part, parts)
    elif stage == "programs":
        prepare.pair_rollouts(settings)
        prepare.make_program_pairs(settings)
    elif stage == "features":
        for name in prepare.DATA_SETS[part::parts]:
            prepare.make_features(settings, name)
    elif stage == "contests":
        run_contests(settings, part, parts)
    else:
        facts = Path(settings["folder"]) / "data.json"
        if not facts.exists():
            sets = [prepare.describe_pairs(settings, name) for name in prepare.DATA_SETS]
            write_json(facts, {"sets": sets, "likelihood": prepare.likelihood(settings, "rollouts")})
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
    Path(settings["folder"]).mkdir(parents=True, exist_ok=True)
    prepare.save_backbone(settings)
    for stage in STAGES:
        parts = (arguments.parts or 2) if stage in SHARED else 1
        command = [sys.executable, "-m", "experiments.run", *["--quick"] * arguments.quick, "--stage", stage]
        running = [subprocess.Popen([*command, "--part", str(k), "--parts", str(parts)]) for k in range(parts)]
        if sum(process.wait() != 0 for process in running):  # waits for all
            raise SystemExit(f"the stage {stage!r} failed; the next `make experiment` goes on from there")


if __name__ == "__main__":
    main()
