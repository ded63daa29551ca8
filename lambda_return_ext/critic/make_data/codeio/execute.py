"""Start judges, wait for them, and end them: the parent's side of `judge.py`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

JUDGE = Path(__file__).with_name("judge.py")
MIN_INPUTS = 3
# Enough for Python and its packages to be found; the rest of the user's environment is not the programs' business.
PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class Limits:
    """What judged programs may use; nothing of the network and no file may be written."""

    # A reference, all inputs together: the first that is enough counts. Its mutants get four times as long.
    reference_cpu_seconds: tuple[float, ...] = (0.05, 0.5)
    wall_seconds: float = 10.0  # any program, should it sleep or the machine be busy
    judge_cpu_seconds: float = 5.0  # one problem, less its programs: making the inputs
    judge_wall_seconds: float = 120.0  # one problem with all of its programs, by the wall clock
    memory_bytes: int = 1 << 30


@dataclass(frozen=True)
class Verdict:
    """One program's judgement."""

    failed: float  # fraction of the inputs answered otherwise than the reference does
    crash: bool  # it returned no value for any input


@dataclass(frozen=True)
class Judgement:
    """What a judge found: why the problem is of no use, or a verdict for each program."""

    dropped: str | None = None
    answers: str = ""  # a digest of all of the reference's answers
    inputs: int = 0
    verdicts: tuple[Verdict, ...] = ()


class Judges:
    """Judges for any number of threads: each thread keeps one process for each hash seed it asks for.

    Leaving the `with` block ends them, whatever they are doing. Should this process be killed, they end by
    themselves: their stdin closes.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._lock = threading.Lock()
        self._processes: dict[tuple[int, int], subprocess.Popen[str]] = {}  # by thread and hash seed
        self._stopped = False

    def __enter__(self) -> Judges:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all judges; no other can start."""
        with self._lock:
            self._stopped = True
            for process in self._processes.values():
                _end(process)

    def judge(
        self,
        generator: str,
        reference: str,
        programs: Sequence[str] = (),
        *,
        inputs: int = 20,
        confirming: int = 40,
        seed: int = 0,
        hash_seed: int = 0,
    ) -> Judgement:
        """Judge `programs` against `reference` on generated inputs, in a fork of this thread's judge.

        Args:
            generator: source of `generate_inputs(rng) -> dict`.
            reference: source of the right `main_solution`.
            programs: sources of `main_solution` to judge.
            inputs: how many distinct inputs decide whether the problem is of use and a program is wrong.
            confirming: how many more a program has to get right before it is called right.
            seed: seed of the inputs.
            hash_seed: PYTHONHASHSEED, which decides the order of sets of strings.
        """
        request = {
            "generator": generator,
            "reference": reference,
            "programs": list(programs),
            "inputs": inputs,
            "confirming": confirming,
            "min_inputs": MIN_INPUTS,
            "seed": seed,
            "limits": asdict(self.limits),
        }
        process = self._process(hash_seed)
        try:
            print(json.dumps(request), file=process.stdin, flush=True)
            found: dict[str, Any] = json.loads(next(iter(process.stdout or ())))
        except (BrokenPipeError, StopIteration, json.JSONDecodeError):
            return Judgement(dropped="judge died")
        verdicts = tuple(Verdict(**verdict) for verdict in found.pop("verdicts", ()))
        return Judgement(**found, verdicts=verdicts)

    def _process(self, hash_seed: int) -> subprocess.Popen[str]:
        key = (threading.get_ident(), hash_seed)
        with self._lock:
            if self._stopped:
                raise RuntimeError("these judges were stopped")
            process = self._processes.get(key)
            if process and process.poll() is not None:
                _end(process)
                process = None
            self._processes[key] = process or _start(hash_seed)
            return self._processes[key]


def _start(hash_seed: int) -> subprocess.Popen[str]:
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment |= {"PYTHONHASHSEED": str(hash_seed), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-s", str(JUDGE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env=environment,
        start_new_session=True,  # a process group of its own, so that its forks end with it
    )


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a judge with its forks, wait for it, and close its pipes."""
    if process.returncode is None:  # nobody has waited for it, so the number is still its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(BrokenPipeError), process:
        pass
