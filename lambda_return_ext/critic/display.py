"""Progress on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
