"""Counts the instructions a token of every CPU kernel, which do not depend on how busy the machine is.

Run it with the program that the CMake target ``instruction_counts`` builds; it needs valgrind.

    python csrc/testing/instruction_counts.py PROGRAM                     compares with the figures, +5 % allowed
    python csrc/testing/instruction_counts.py PROGRAM --write COMPILER    writes them to instruction_counts.json

COMPILER is what CMake prints as the compiler's identification; the figures hold for that one alone.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

FIGURES = Path(__file__).with_suffix(".json")
SETS = ("portable", "avx2")  # valgrind has no AVX-512
ALLOWED = 1.05


def per_token(program: str, instruction_set: str) -> dict[str, float]:
    """Return the instructions a token of each case of an instruction set."""
    with tempfile.TemporaryDirectory() as folder:
        # One file for each call of counted(): profile.1, profile.2, ...
        collect = ("--toggle-collect=counted", "--dump-after=counted", f"--callgrind-out-file={folder}/profile")
        command = ["valgrind", "--tool=callgrind", *collect, program, instruction_set]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr}")
        counts = {}
        for number, line in enumerate(done.stdout.splitlines(), start=1):
            tokens, case = line.split(maxsplit=1)
            profile = Path(folder, f"profile.{number}").read_text()
            (instructions,) = re.findall(r"^totals: (\d+)$", profile, re.MULTILINE)
            counts[case] = round(int(instructions) / int(tokens), 3)
        return counts


def main() -> None:
    """Compare with the checked-in figures, or write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("--write", metavar="COMPILER", help="write the figures, as those of this compiler")
    options = parser.parse_args()
    counted: dict[str, float] = {}
    with ThreadPoolExecutor() as pool:
        for counts in pool.map(partial(per_token, options.program), SETS):
            counted |= counts
    if options.write:
        figures = {"compiler": options.write, "instructions_per_token": counted}
        FIGURES.with_suffix(".tmp").write_text(json.dumps(figures, indent=2) + "\n")
        FIGURES.with_suffix(".tmp").replace(FIGURES)
    figures = json.loads(FIGURES.read_text())["instructions_per_token"]
    if unlike := sorted(figures.keys() ^ counted.keys()):
        sys.exit(f"counted or checked in, but not both: {', '.join(unlike)}")
    above = False
    for case, count in counted.items():
        too_many = count > ALLOWED * figures[case]
        above = above or too_many
        print(f"{case:55} {count:9.3f}  was {figures[case]:9.3f}{'  ABOVE +5 %' if too_many else ''}")
    sys.exit(above)


if __name__ == "__main__":
    main()
