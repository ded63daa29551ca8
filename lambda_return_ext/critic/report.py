"""What people see: progress, the metrics files and the tables."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lambda_return_ext.critic import checkpoint
from lambda_return_ext.critic.config import Config
from lambda_return_ext.critic.distributed import Ranks
from lambda_return_ext.critic.trackers import Trackers

SECONDS_BETWEEN_LINES = 10.0
LINE_WIDTH = 120
Advance = Callable[..., None]


class Display:
    """Progress on a terminal as bars, elsewhere as plain lines, a few for each phase.

    Args:
        quiet: show nothing, as all ranks but the first do.
    """

    def __init__(self, quiet: bool = False) -> None:
        # Where there is no terminal to ask, rich would fold the table into 80 columns.
        self.console = Console(highlight=False, width=None if sys.stdout.isatty() else LINE_WIDTH, quiet=quiet)

    def line(self, text: str) -> None:
        """Print one line, above any bar."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def phase(self, title: str, unit: str, total: int | None, done: int = 0) -> Iterator[Advance]:
        """Show the progress of `total` units, None where nobody knows; yields `advance(units, status="")`."""
        if self.console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit)
            more = TimeRemainingColumn(), TextColumn("{task.fields[status]}")
            with Progress(*columns, *more, console=self.console) as progress:
                task = progress.add_task(title, total=total, completed=done, status="")
                yield lambda units, status="": progress.update(task, advance=units, status=status)
            return

        started = said = time.monotonic()
        before = done

        def advance(units: int, status: str = "") -> None:
            nonlocal done, said
            done += units
            now = time.monotonic()
            if done == total or now - said >= SECONDS_BETWEEN_LINES:
                said = now
                seconds = max(now - started, 1e-9)
                rate = (done - before) / seconds
                of_total = "" if total is None else f"/{total}"
                self.line(f"{title}: {done}{of_total} {unit}, {seconds:.0f} s, {rate:.0f} {unit}/s {status}".rstrip())

        yield advance


class MetricLog:
    """Metrics of each step, as JSON lines and for the trackers of the configuration.

    Args:
        config: the run.
        step: the last step that counts; what a killed run logged after its checkpoint is removed.
        say: shows a line.
    """

    def __init__(self, config: Config, step: int, say: Callable[[str], None]):
        run_dir = Path(config.run_dir)
        path = run_dir / checkpoint.METRICS
        kept = [json.dumps(record) + "\n" for record in read_metrics(run_dir) if record["step"] <= step]
        checkpoint.write_text(path, "".join(kept))
        self._trackers = Trackers(config, step, say)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the metrics of one step; lists, which are curves, go to the JSON lines alone."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, list)}
        self._trackers.write(step, numbers)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._file.close()
        self._trackers.close(failed=kind is not None)


class NoLog:
    """The log of a rank that writes none."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log nothing."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def open_log(config: Config, step: int, ranks: Ranks, display: Display) -> MetricLog | NoLog:
    """The log of a run, which the first rank writes."""
    return ranks.on_first(lambda: MetricLog(config, step, display.line)) or NoLog()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole records of a run; a line that a killed run left half written is left out."""
    path = run_dir / checkpoint.METRICS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


ROWS = {
    "pairwise accuracy": "pairwise_accuracy",
    "accuracy of the last token": "last_token_accuracy",
    "mean value, right": "mean_right",
    "mean value, wrong": "mean_wrong",
    "margin": "margin",
    "token variance, right": "token_variance_right",
    "token variance, wrong": "token_variance_wrong",
    "explained variance": "explained_variance",
    "Brier score": "brier",
    "calibration error": "calibration_error",
    "TD-error spikiness, right": "td_spikiness_right",
    "TD-error spikiness, wrong": "td_spikiness_wrong",
    "correlation with position, right": "position_correlation_right",
    "correlation with position, wrong": "position_correlation_wrong",
    "loss": "loss",
}


DATA_ROWS = {
    "problems": ("problems", ","),
    "pairs": ("pairs", ","),
    "pairs that could be made": ("possible_pairs", ","),
    "tokens": ("tokens", ","),
    "output tokens": ("output_tokens", ","),
    "mean output tokens, right": ("mean_length_right", ".1f"),
    "mean output tokens, wrong": ("mean_length_wrong", ".1f"),
    "pairs with the longer side right": ("right_longer", ".1%"),
    "pairs with the shorter side right": ("right_shorter", ".1%"),
}


def print_data(display: Display, summary: Mapping[str, Any]) -> None:
    """Print what a run trains on and is measured on, and what of its data it leaves out."""
    display.line(summary["path"])
    table = Table()
    table.add_column("")
    parts = ("train", "validation")
    for part in parts:
        table.add_column(part, justify="right")
    for title, (key, style) in DATA_ROWS.items():
        table.add_row(title, *(f"{summary[part][key]:{style}}" for part in parts))
    display.console.print(table)
    if summary["truncated_prompts"]:
        display.line(f"cut the beginning of the prompt: {summary['truncated_prompts']:,} pairs")
    for reason, number in summary["dropped"].items():
        display.line(f"dropped: {number:,} {reason}")


def print_results(display: Display, results: Mapping[str, Any]) -> None:
    """Print the final table: each checkpoint on validation and on training pairs, then the baselines."""
    display.line(results["title"])
    table = Table()
    table.add_column("")
    for name, measured in results["checkpoints"].items():
        for part in ("validation", "train pairs"):
            table.add_column(f"{name} (step {measured['step']})\n{part}", justify="right")
    metrics = [measured["metrics"] for measured in results["checkpoints"].values()]
    for title, key in ROWS.items():
        style = ".4f" if "accuracy" in key else ".4g"  # margins and variances can be tiny
        cells = [f"{m[f'{part}/{key}']:{style}}" for m in metrics for part in ("validation", "train_subset")]
        table.add_row(title, *cells)
    table.add_row("gap (train - validation)", *(c for m in metrics for c in (f"{m['validation/gap']:.4f}", "")))
    table.add_section()
    for i, title in enumerate(length_bins(metrics[0])):
        cells = [cell for m in metrics for cell in (f"{m['validation/length_accuracy'][i]:.4f}", "")]
        table.add_row(f"pairwise accuracy, {title}", *cells)
    if results["baselines"]:
        table.add_section()
        for title, accuracy in results["baselines"].items():
            table.add_row(f"baseline: {title}", f"{accuracy:.4f}")
    display.console.print(table)


def length_bins(measured: Mapping[str, Any]) -> list[str]:
    """Titles of the parts of equal size by which accuracy on validation is told by length."""
    ends = zip(measured["validation/length_shortest"], measured["validation/length_longest"], strict=True)
    return [f"{low:.0f} to {high:.0f} tokens" for low, high in ends]
