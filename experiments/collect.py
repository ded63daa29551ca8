"""What the report is made from, as CSV files in git: the runs, what each ranked right, and the data in numbers."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments import prepare
from experiments.settings import Settings
from lambda_return_ext.critic.files import write_text

Run = Mapping[str, Any]
KEYS = ("data_set", "regime", "contestant", "seed")
MEASURED = (
    *("train_problems", "train_pairs", "validation_pairs", "warmup_gradient_elsewhere", "length", "seconds"),
    *("validation_last_token_accuracy", "validation_margin", "train_margin", "validation_token_variance_wrong"),
)
CHECKED = (
    *("step", "validation_pairwise_accuracy", "train_pairwise_accuracy"),
    *("validation_token_variance_right", "validation_mean"),
)
PARTS = ("validation", "human_eval")


class Table(NamedTuple):
    """Rows of a CSV file, which the page shows too."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def csv(self) -> str:
        """As the text of a CSV file."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([self.columns, *self.rows])
        return text.getvalue()

    def markdown(self) -> str:
        """As a table of the page."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def collect(settings: Settings) -> None:
    """Write the CSV files from the folder of data and finished runs."""
    folder, results = Path(settings["folder"]), Path(settings["results"])
    runs = [prepare.read_json(path) for path in sorted((folder / "runs").glob("*.json"))]
    facts = prepare.read_json(folder / "data.json")
    problems, ranked = ranked_tables(runs)
    tables = {
        "runs": Table((*KEYS, *MEASURED), [(*key(run), *(value(run, name) for name in MEASURED)) for run in runs]),
        "checks": Table(
            (*KEYS, *CHECKED),
            [(*key(run), *(f"{row[name]:.5g}" for name in CHECKED)) for run in runs for row in run["trace"]],
        ),
        "problems": problems,
        "ranked": ranked,
        "data_sets": Table(tuple(facts["sets"][0]), [tuple(each.values()) for each in facts["sets"]]),
        "likelihood": Table(("problem", "accuracy"), [(name, *each) for name, each in facts["likelihood"].items()]),
        "pass_rates": pass_rates(settings),
        "times": times(folder / "times.json"),
    }
    results.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        write_text(results / f"{name}.csv", table.csv())


def key(run: Run) -> tuple[Any, ...]:
    """What tells one run from the others."""
    return tuple(run[name] for name in KEYS)


def value(run: Run, name: str) -> Any:
    """A number of a run, or of its last check."""
    if name not in run:
        return f"{run['trace'][-1][name]:.5g}"
    return "" if run[name] is None else run[name]


def ranked_tables(runs: Sequence[Run]) -> tuple[Table, Table]:
    """A number for each problem, and for each run and problem which of its pairs were ranked right: `12:0110`."""
    numbers: dict[tuple[str, str], int] = {}
    rows: list[tuple[Any, ...]] = []
    for run in runs:
        for part in PARTS:
            data_set = run["data_set"] if part == "validation" else part
            cells = [
                f"{numbers.setdefault((data_set, problem), len(numbers))}:{''.join(map(str, pairs))}"
                for problem, pairs in run[part].items()
            ]
            if cells:
                rows.append((*key(run), part, " ".join(cells)))
    names = [(number, *name) for name, number in numbers.items()]
    return Table(("number", "data_set", "problem"), names), Table((*KEYS, "part", "ranked"), rows)


def pass_rates(settings: Settings) -> Table:
    """How often the answers of each family are right; an answer without "Answer:" is not judged."""
    low, high = settings["rollouts"]["pass_rate"]
    found: dict[str, list[list[bool | None]]] = defaultdict(list)
    for path in sorted((Path(settings["folder"]) / "rollouts").glob("*.json")):
        for problem in prepare.read_json(path):
            found[problem["family"]].append(problem["right"])
    rows: list[tuple[Any, ...]] = []
    for family, problems in found.items():
        labels = [label for problem in problems for label in problem]
        right, wrong = labels.count(True), labels.count(False)
        rates = right / max(right + wrong, 1), right / len(labels)
        mixed = sum(True in problem and False in problem for problem in problems)
        within = "yes" if all(low <= rate <= high for rate in rates) else "OUTSIDE"
        counts = len(problems), mixed, len(labels), right, wrong
        rows.append((family, *counts, *(f"{rate:.3f}" for rate in rates), within))
    columns = ("family", "problems", "with_both_kinds", "answers", "right", "wrong", "of_judged", "of_all")
    return Table((*columns, f"within_{low:g}_{high:g}"), rows)


def times(path: Path) -> Table:
    """The wall time of each stage, over the calls that finished it."""
    calls = prepare.read_json(path) if path.exists() else []
    rows = []
    for stage in dict.fromkeys(call["stage"] for call in calls):
        same = [call for call in calls if call["stage"] == stage]
        seconds = round(sum(call["seconds"] for call in same))
        rows.append((stage, seconds, same[0]["processes"], len(same), cpu_name(), torch.__version__))
    return Table(("stage", "seconds", "processes", "calls", "processor", "torch"), rows)


def cpu_name() -> str:
    """The processor, where the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def note_time(folder: Path, stage: str, seconds: float, processes: int) -> None:
    """Add a finished stage to the times."""
    path = folder / "times.json"
    calls = prepare.read_json(path) if path.exists() else []
    calls.append({"stage": stage, "seconds": round(seconds, 1), "processes": processes})
    write_text(path, json.dumps(calls) + "\n")


def read_table(settings: Settings, name: str) -> Table:
    """One of the CSV files, its cells as text."""
    path = Path(settings["results"]) / f"{name}.csv"
    with path.open(encoding="utf-8", newline="") as file:
        columns, *rows = csv.reader(file)
    return Table(tuple(columns), [tuple(row) for row in rows])


def read_runs(settings: Settings) -> Sequence[Run]:
    """The runs as `collect` found them, as far as the report needs them."""
    problems = {number: name for number, _, name in read_table(settings, "problems").rows}
    traces: dict[tuple[str, ...], list[dict[str, float]]] = defaultdict(list)
    for row in read_table(settings, "checks").rows:
        traces[row[: len(KEYS)]].append(dict(zip(CHECKED, map(float, row[len(KEYS) :]), strict=True)))
    ranked: dict[tuple[str, ...], dict[str, dict[str, list[int]]]] = defaultdict(dict)
    for row in read_table(settings, "ranked").rows:
        part, cells = row[len(KEYS) :]
        ranked[row[: len(KEYS)]][part] = dict(_unpack(cells, problems))
    columns, rows = read_table(settings, "runs")
    runs = []
    for row in rows:
        run: dict[str, Any] = dict(zip(columns, row, strict=True))
        run |= {name: float(run[name]) if run[name] else None for name in MEASURED}
        name = row[: len(KEYS)]
        runs.append(
            {**run, "seed": int(run["seed"]), "trace": traces[name], **{part: {} for part in PARTS}, **ranked[name]}
        )
    return runs


def _unpack(cells: str, problems: Mapping[str, str]) -> Iterable[tuple[str, list[int]]]:
    for cell in cells.split():
        number, _, pairs = cell.partition(":")
        yield problems[number], [int(pair) for pair in pairs]
