"""Counts the instructions a token of every CPU kernel, which do not depend on how busy the machine is.

Run it with the program that the CMake target ``instruction_counts`` builds; it needs valgrind.

    python csrc/testing/instruction_counts.py PROGRAM                     compares with the figures, +5 % allowed
    python csrc/testing/instruction_counts.py PROGRAM --write COMPILER    writes them to instruction_counts.json

COMPILER is what CMake prints as the compiler's identification; the figures hold for that one alone.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

FIGURES = Path(__file__).with_suffix(".json")
SETS = ("portable", "avx2")  # valgrind has no AVX-512
KERNELS = (
    "lambda_return",
    "lambda_return_backward",
    "lambda_value_loss",
    "lambda_value_loss_backward",
    "masked_mse",
    "masked_mse_backward",
)
DTYPES = ("float32", "bfloat16", "float16", "float64")
MASKS = ("dense", "gaps")
TOKENS = 10 * 8192
ALLOWED = 1.05


def instructions(program: str, *arguments: str) -> int:
    """Return the number of instructions that a run executes."""
    command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={os.devnull}", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode != 0 or found is None:
        sys.exit(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr}")
    return int(found[1])


@cache
def start_up(program: str, instruction_set: str, dtype: str, mask: str) -> int:
    """Return the instructions of a run that calls no kernel."""
    return instructions(program, instruction_set, KERNELS[0], dtype, mask, "0")


def per_token(program: str, case: tuple[str, str, str, str]) -> float:
    """Return the instructions a token."""
    instruction_set, _kernel, dtype, mask = case
    work = instructions(program, *case, "10") - start_up(program, instruction_set, dtype, mask)
    return round(work / TOKENS, 3)


def main() -> None:
    """Compare with the checked-in figures, or write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("--write", metavar="COMPILER", help="write the figures, as those of this compiler")
    options = parser.parse_args()
    cases = list(itertools.product(SETS, KERNELS, DTYPES, MASKS))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = pool.map(partial(per_token, options.program), cases)
        counted = {" ".join(case): count for case, count in zip(cases, counts, strict=True)}
    if options.write:
        figures = {"compiler": options.write, "instructions_per_token": counted}
        FIGURES.with_suffix(".tmp").write_text(json.dumps(figures, indent=2) + "\n")
        FIGURES.with_suffix(".tmp").replace(FIGURES)
    figures = json.loads(FIGURES.read_text())["instructions_per_token"]
    above = False
    for case, count in counted.items():
        too_many = count > ALLOWED * figures[case]
        above = above or too_many
        print(f"{case:55} {count:7.3f}  was {figures[case]:7.3f}{'  ABOVE +5 %' if too_many else ''}")
    sys.exit(above)


if __name__ == "__main__":
    main()
