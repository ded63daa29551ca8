"""From problems to right/wrong pairs, labelled by execution, in one JSONL file."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lambda_return_ext.critic.make_data.codeio.execute import Judges
from lambda_return_ext.critic.make_data.codeio.mutate import Mutant, mutants
from lambda_return_ext.critic.make_data.codeio.problems import Problem, Unusable, make_problem

MUTANTS_PER_PAIR = 2  # tried for each pair wanted: some survive, some crash, some are one of a kind
SURVIVOR_EVERY = 3  # "was edited" must not mean "is wrong"


@dataclass(frozen=True)
class Options:
    """What to build."""

    seed: int = 0
    min_chars: int = 80
    max_chars: int = 420
    max_prompt_bytes: int = 900
    pairs_per_problem: int = 8
    problems: int | None = None  # judge no more than the first of them


@dataclass
class Counts:
    """What became of the rows and the mutants."""

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    problems: int = 0
    killed: int = 0
    crashed: int = 0  # of the killed
    survivors: int = 0
    pairs: int = 0
    survivor_pairs: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of one problem: a reason to drop it, or its mutants, judged."""

    dropped: str | None = None
    killed: tuple[tuple[Mutant, float, bool], ...] = ()  # with the fraction of inputs failed, and "crash"
    survivors: tuple[Mutant, ...] = ()


def build_pairs(
    rows: Iterable[dict[str, Any]],
    options: Options,
    judges: Judges,
    workers: int,
    on_progress: Callable[[int, int], None],
) -> tuple[list[dict[str, Any]], Counts]:
    """Turn rows of the CodeI/O file into pair records.

    Problems are judged side by side and collected in their order, so the records do not depend on `workers`.

    Args:
        rows: rows of the file.
        options: what to build.
        judges: where programs run; stopped at an exception, Ctrl-C among them.
        workers: how many problems to judge at a time.
        on_progress: called with the number of problems judged, and of all.
    """
    counts = Counts()
    problems = _select(rows, options, counts)
    records: list[dict[str, Any]] = []
    seen: set[tuple[str, str, str]] = set()
    with ThreadPoolExecutor(workers) as threads:
        futures = [threads.submit(examine, problem, options, judges) for problem in problems]
        try:
            for done, (problem, future) in enumerate(zip(problems, futures, strict=True), start=1):
                outcome = future.result()
                _count(outcome, counts)
                for record in make_pairs(problem, outcome, options.pairs_per_problem):
                    key = (record["problem_id"], record["chosen"], record["rejected"])
                    if key not in seen:
                        seen.add(key)
                        records.append(record)
                on_progress(done, len(problems))
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            judges.stop()
            raise
    counts.pairs = len(records)
    counts.survivor_pairs = sum(record["chosen_how"] != "original" for record in records)
    return records, counts


def _select(rows: Iterable[dict[str, Any]], options: Options, counts: Counts) -> list[Problem]:
    problems: dict[tuple[str, str], Problem] = {}
    for row in rows:
        if len(problems) == options.problems:
            break
        counts.rows += 1
        try:
            problem = make_problem(row, options.min_chars, options.max_chars, options.max_prompt_bytes)
        except Unusable as reason:
            counts.dropped[str(reason)] += 1
            continue
        if (problem.prompt, problem.reference) in problems:
            counts.dropped["same task and program as another"] += 1
        problems.setdefault((problem.prompt, problem.reference), problem)
    return list(problems.values())


def examine(problem: Problem, options: Options, judges: Judges) -> Outcome:
    """Judge a problem and its mutants.

    The published program answers first, in a process with another hash seed. The reference has to agree with it:
    that shows that stripping changed nothing and that the answers depend on the inputs alone.
    """
    published = judges.judge(problem.generator, problem.original, seed=options.seed, hash_seed=1)
    if published.dropped:
        return Outcome(dropped=published.dropped)
    rng = random.Random(f"{options.seed} {problem.reference}")
    candidates = mutants(problem.reference, rng, MUTANTS_PER_PAIR * options.pairs_per_problem)
    judgement = judges.judge(
        problem.generator, problem.reference, [mutant.source for mutant in candidates], seed=options.seed
    )
    if judgement.dropped:
        return Outcome(dropped=judgement.dropped)
    if judgement.answers != published.answers:
        return Outcome(dropped="answers differ between runs")
    judged = list(zip(candidates, judgement.verdicts, strict=True))
    killed = tuple((mutant, verdict.failed, verdict.crash) for mutant, verdict in judged if verdict.failed)
    survivors = tuple(mutant for mutant, verdict in judged if not verdict.failed)
    return Outcome(None if killed else "no mutant killed", killed, survivors)


def make_pairs(problem: Problem, outcome: Outcome, limit: int) -> list[dict[str, Any]]:
    """Pair killed mutants with the reference, and every third one with a survivor where there is one.

    Mutants that crash on every input come last: what is wrong with them is seldom where a solution goes wrong.
    """
    pairs = []
    for index, (mutant, failed, crash) in enumerate(sorted(outcome.killed, key=lambda each: each[2])[:limit]):
        chosen, how = problem.reference, "original"
        if outcome.survivors and index % SURVIVOR_EVERY == 0:
            survivor = outcome.survivors[index // SURVIVOR_EVERY % len(outcome.survivors)]
            chosen, how = survivor.source, f"survivor:{survivor.operator}"
        pairs.append(
            {
                "problem_id": problem.problem_id,
                "prompt": problem.prompt,
                "chosen": chosen,
                "rejected": mutant.source,
                "chosen_how": how,
                "rejected_how": f"mutant:{mutant.operator}",
                "rejected_failed": round(failed, 4),
                "rejected_crash": crash,
            }
        )
    return pairs


def _count(outcome: Outcome, counts: Counts) -> None:
    if outcome.dropped:
        counts.dropped[outcome.dropped] += 1
        return
    counts.problems += 1
    counts.killed += len(outcome.killed)
    counts.crashed += sum(crash for _, _, crash in outcome.killed)
    counts.survivors += len(outcome.survivors)


def write_jsonl(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Write one record a line; the file appears whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "x", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
