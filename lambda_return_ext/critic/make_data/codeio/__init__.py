"""`lambda-critic make-data codeio`: right/wrong pairs of Python programs, labelled by execution alone.

reasoning-gym's CodeI/O file has programming problems with a reference program and a generator of inputs. Each
reference is mutated; a mutant whose outputs differ from the reference's on the generated inputs is wrong (killed),
one whose outputs are all the same is right (a survivor).

This runs third-party programs and random edits of them on this machine, with limits on time, memory, files and the
network. The limits stop accidents. They are no security sandbox.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lambda_return_ext.critic.errors import UserError
from lambda_return_ext.critic.make_data.codeio.build import Counts, Options, build_pairs, write_jsonl
from lambda_return_ext.critic.make_data.codeio.execute import Judges
from lambda_return_ext.critic.make_data.codeio.problems import find_data, read_rows

WARNING = (
    "This runs third-party programs from reasoning-gym, and random edits of them, on this machine. Time, memory, "
    "files and the network are limited, which stops accidents; it is NO security sandbox."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.description = f"Build right/wrong pairs of Python programs, labelled by execution. {WARNING}"
    parser.add_argument("--output", type=Path, default=Path("data/codeio.jsonl"), help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file if there is one")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs and the mutants; default: 0")
    parser.add_argument("--min-chars", type=int, default=80, help="shortest program, stripped; default: 80")
    parser.add_argument("--max-chars", type=int, default=420, help="longest program, stripped; default: 420")
    parser.add_argument("--max-prompt-bytes", type=int, default=900, help="longest prompt; default: 900")
    parser.add_argument("--pairs-per-problem", type=int, default=8, metavar="N", help="at most; default: 8")
    parser.add_argument("--problems", type=int, metavar="N", help="judge only the first N that pass the filters")
    parser.add_argument("--workers", type=int, metavar="N", help="problems run at a time; default: one a CPU")


def run(args: argparse.Namespace) -> int:
    """Build the file and print what became of the problems.

    Raises:
        UserError: the arguments make no sense, the output file exists, or reasoning-gym is not installed.
    """
    _check(args)
    path = find_data()
    print(WARNING)
    options = Options(
        seed=args.seed,
        min_chars=args.min_chars,
        max_chars=args.max_chars,
        max_prompt_bytes=args.max_prompt_bytes,
        pairs_per_problem=args.pairs_per_problem,
        problems=args.problems,
    )
    start = time.monotonic()
    with _progress() as on_progress, Judges() as judges:
        workers = args.workers or os.cpu_count() or 1
        records, counts = build_pairs(read_rows(path), options, judges, workers, on_progress)
    if not records:
        raise UserError(f"no pairs came of these arguments: {dict(counts.dropped)}")
    try:
        write_jsonl(records, args.output)
    except OSError as error:
        raise UserError(f"--output must be a file that can be written, got {str(args.output)!r}: {error}") from error
    print(_summary(counts, time.monotonic() - start))
    print(f"wrote {args.output}")
    return 0


def _check(args: argparse.Namespace) -> None:
    if sys.platform != "linux":
        raise UserError(f"make-data codeio needs Linux, whose limits it sets on programs; this is {sys.platform}")
    for name, smallest in (("pairs_per_problem", 1), ("problems", 1), ("workers", 1), ("min_chars", 0)):
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name.replace('_', '-')} must be at least {smallest}, got {value}")
    if args.min_chars > args.max_chars:
        raise UserError(f"--min-chars must be at most --max-chars, got {args.min_chars} and {args.max_chars}")
    if args.output.exists() and not args.overwrite:
        raise UserError(f"{args.output} exists: choose another --output, or pass --overwrite")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {args.output.parent}: {error.strerror}") from None
    if not os.access(args.output.parent, os.W_OK):
        raise UserError(f"cannot write to the folder {args.output.parent}")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows how far we are: a bar on a terminal, else a line every hundred problems."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("problems")
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:

        def print_line(done: int, total: int) -> None:
            if done % 100 == 0 or done == total:
                print(f"problems: {done}/{total}", file=sys.stderr, flush=True)

        yield print_line


def _summary(counts: Counts, seconds: float) -> str:
    lines = [("rows read", counts.rows)]
    lines += [(f"  dropped: {reason}", number) for reason, number in counts.dropped.most_common()]
    lines += [
        ("problems", counts.problems),
        ("mutants killed", counts.killed),
        ("  that crash on every input", counts.crashed),
        ("mutants that survive", counts.survivors),
        ("pairs", counts.pairs),
        ("  with a survivor as right side", counts.survivor_pairs),
        ("seconds", round(seconds)),
    ]
    return "\n".join(f"{name:<48}{number:>8,}" for name, number in lines)
