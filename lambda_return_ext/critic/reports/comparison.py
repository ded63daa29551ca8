"""`lambda-critic compare`: several runs side by side, as tables and as one picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from lambda_return_ext.critic import checkpoint
from lambda_return_ext.critic.config import load_config
from lambda_return_ext.critic.display import Display
from lambda_return_ext.critic.errors import UserError
from lambda_return_ext.critic.reports.log import read_metrics
from lambda_return_ext.critic.reports.plots import plot_comparison, shared_length_bins
from lambda_return_ext.critic.reports.tables import ROWS

# Where a run keeps its files, which every run does elsewhere.
PLACES = ("run_dir", "tracking.name")


class Run(NamedTuple):
    """A finished run as its folder has it."""

    name: str
    config: dict[str, Any]
    data: dict[str, Any]
    results: dict[str, Any]
    records: list[dict[str, Any]]


def compare_runs(folders: Sequence[str], output: str) -> None:
    """Print how runs differ in configuration and results, and draw them into one picture.

    Args:
        folders: the runs, at least two.
        output: the PNG file to write.

    Raises:
        UserError: a folder holds no finished run, or the picture cannot be written.
    """
    if len(folders) < 2:
        raise UserError(f"RUN must be given at least twice, got {len(folders)}")
    if Path(output).suffix.lower() != ".png":
        raise UserError(f"--output must end in .png, got {output!r}")
    display, names = Display(), _names(folders)
    runs = [read_run(Path(folder), name) for folder, name in zip(folders, names, strict=True)]
    print_configs(display, runs)
    print_runs(display, runs)
    if any(
        (run.data["sha256"], run.data["validation"]) != (runs[0].data["sha256"], runs[0].data["validation"])
        for run in runs
    ):
        display.line("The runs were measured on different data: their numbers do not compare.")
    try:
        plot_comparison([(run.name, run.records, run.results) for run in runs], Path(output))
    except OSError as error:
        raise UserError(f"--output must be a file that can be written, got {output!r}: {error}") from error
    display.line(f"wrote {output}")


def _names(folders: Sequence[str]) -> list[str]:
    """The folders' own names where they differ, else their paths."""
    names = [Path(folder).resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else list(folders)


def read_run(run_dir: Path, name: str) -> Run:
    """Read what a finished run left.

    Raises:
        UserError: the folder holds no run, or one that did not end.
    """
    config = load_config(checkpoint.config_path(run_dir)).model_dump()
    path = run_dir / checkpoint.RESULTS
    if not path.is_file():
        raise UserError(f"RUN must be a finished run, with a {checkpoint.RESULTS} in it, got {str(run_dir)!r}")
    results = json.loads(path.read_text(encoding="utf-8"))
    return Run(name, checkpoint.flatten(config), results["data"], results, read_metrics(run_dir))


def print_configs(display: Display, runs: Sequence[Run]) -> None:
    """Print the configuration keys in which the runs differ."""
    table = Table()
    for title in ("", *(run.name for run in runs)):
        table.add_column(title, overflow="fold")
    for key in dict.fromkeys(key for run in runs for key in run.config):
        values = [run.config.get(key) for run in runs]
        if key not in PLACES and any(value != values[0] for value in values):
            table.add_row(key, *("null" if value is None else str(value) for value in values))
    if table.row_count:
        display.line("Configuration, where it differs")
        display.console.print(table)
    else:
        display.line("The runs have the same configuration.")


def print_runs(display: Display, runs: Sequence[Run]) -> None:
    """Print the results of each run's best checkpoint on validation, and the accuracy of its last."""
    best = [run.results["checkpoints"]["best"] for run in runs]
    display.line("Validation, best checkpoint")
    table = Table()
    table.add_column("")
    for run, measured in zip(runs, best, strict=True):
        table.add_column(f"{run.name}\n(step {measured['step']})", justify="right", overflow="fold")
    for title, key in ROWS.items():
        style = ".4f" if "accuracy" in key else ".4g"
        numbers = [measured["metrics"].get(f"validation/{key}") for measured in best]
        if any(number is not None for number in numbers):
            table.add_row(title, *("" if number is None else f"{number:{style}}" for number in numbers))
    table.add_row("gap (train - validation)", *(f"{measured['metrics']['validation/gap']:.4f}" for measured in best))
    table.add_section()
    for i, title in enumerate(shared_length_bins([measured["metrics"] for measured in best])):
        parts = [measured["metrics"].get("validation/length_accuracy", []) for measured in best]
        cells = [f"{part[i]:.4f}" if i < len(part) else "" for part in parts]
        table.add_row(f"pairwise accuracy, {title}", *cells)
    table.add_section()
    last = [run.results["checkpoints"]["last"] for run in runs]
    for title, key in (("pairwise accuracy", "pairwise_accuracy"), ("explained variance", "explained_variance")):
        numbers = [m["metrics"].get(f"validation/{key}") for m in last]
        table.add_row(f"{title}, last checkpoint", *("" if x is None else f"{x:.4f}" for x in numbers))
    for title in dict.fromkeys(title for run in runs for title in run.results["baselines"]):
        scores = [run.results["baselines"].get(title) for run in runs]
        table.add_row(f"baseline: {title}", *("" if score is None else f"{score:.4f}" for score in scores))
    display.console.print(table)
