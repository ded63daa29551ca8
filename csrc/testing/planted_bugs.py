"""Sees that every planted bug is noticed, and that docs/planted_bugs.md says by which build.

Usage: planted_bugs.py TABLE BUILD=PROGRAM ... [--write]

PROGRAM is planted_bugs_test in one build. Fails where a bug goes unnoticed everywhere, where a build reports something
without a bug, and where TABLE is not what was seen (--write makes it so).
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

# What a report is called in the table; the first that matches counts. A kernel that jumps to a random address may fail
# in many ways, which is one word here.
REPORTS = (
    (r"ThreadSanitizer: data race", "data race"),
    (r"AddressSanitizer: heap-buffer-overflow", "heap-buffer-overflow"),
    (r"Sanitizer: SEGV|Sanitizer:DEADLYSIGNAL", "invalid address"),
    (r"runtime error: ", "undefined behaviour"),
    (r"wrong result", "wrong result"),
)
BUILD_NAMES = {"plain": "plain", "thread": "ThreadSanitizer", "address": "Address + UB sanitizers"}
SILENT = "-"
HEADER = """# Planted bugs

Each row is a bug that a test plants in the shipped CUDA kernels (`enum Bug` in `csrc/cuda/platform.cuh`), each column a
build of the kernel tests under the emulator, each cell what that build reported. Written by
`csrc/testing/planted_bugs.py`; `ctest` fails when a bug goes unnoticed by all builds or when this page is stale.

"""


def run(program: str, *arguments: str) -> tuple[int, str]:
    """Exit status (negative: the signal) and output of the program."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, errors="replace", timeout=300)
    return done.returncode, done.stdout + done.stderr


def outcome(program: str, bug: str) -> str:
    """What the program noticed of the bug, in a word for the table."""
    status, output = run(program, bug)
    if status == 0:
        return SILENT
    for pattern, name in REPORTS:
        if re.search(pattern, output):
            return name
    return "invalid address" if status < 0 else f"exit {status}"


def table(outcomes: dict[str, dict[str, str]], builds: list[str]) -> str:
    """The page: a row per bug, a column per build."""
    rows = [["bug", *(BUILD_NAMES[build] for build in builds)]]
    rows += [[bug.replace("_", " "), *(cells[build] for build in builds)] for bug, cells in outcomes.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return HEADER + "\n".join(lines) + "\n"


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("programs", nargs="+", metavar="BUILD=PROGRAM")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    programs = dict(program.split("=", 1) for program in args.programs)
    none, *bugs = run(next(iter(programs.values())))[1].split()

    problems = []
    for build, program in programs.items():
        status, output = run(program, none)
        if status != 0:
            problems.append(f"{build}: without a bug, exit {status}\n{output}")
    outcomes = {bug: {build: outcome(program, bug) for build, program in programs.items()} for bug in bugs}
    problems += [f"{bug}: unnoticed" for bug, cells in outcomes.items() if set(cells.values()) == {SILENT}]

    page = table(outcomes, list(programs))
    print(page)
    if args.write:
        args.table.write_text(page)
    elif not args.table.exists() or args.table.read_text() != page:
        problems.append(f"{args.table} is stale: build the target planted_bugs_page")
    print("\n".join(problems) or "every planted bug was noticed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
