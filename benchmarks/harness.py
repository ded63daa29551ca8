"""What the benchmarks share: answers checked in float64, contestants timed in turn, CSV that says what ran where."""

import csv
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lambda_return_ext as lr

GAMMA, LAM = 1.0, 0.95
# Largest error, relative to the largest exact number, with which an answer passes.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Calls are timed in batches of about this long: far above the clock's resolution, below a scheduler's time slice.
BATCH_SECONDS = 5e-4


class Batch(NamedTuple):
    """The arguments of compute_lambda_value_loss in their order."""

    values: Tensor  # [B, T]
    rewards: Tensor  # [B]
    attention_mask: Tensor  # [B, T], bool
    loss_mask: Tensor  # [B, T], bool


Answers = tuple[Tensor, ...]


@dataclass(frozen=True)
class Contestant:
    """One way to an answer, ready to be timed: conversions of its inputs are done, compilers have run."""

    name: str
    version: str  # of the package that does the work
    call: Callable[[], Any]
    # What `call` returned, in the form that the exact answer has. Not timed.
    answer: Callable[[Any], Tensor] = lambda result: result
    bytes_a_token: int | None = None  # read and written; None where that is not ours to say
    floor: str = ""  # the contestant that copies as many bytes
    # Seconds of n calls, for contestants in another process.
    clock: Callable[[int], float] | None = None

    def seconds(self, calls: int) -> float:
        """Time `calls` calls, one after the other."""
        if self.clock is not None:
            return self.clock(calls)
        call = self.call
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - start


class Timing(NamedTuple):
    """Seconds of one call: minimum and median over batches of calls."""

    minimum: float
    median: float
    samples: int


# ---- answers -----------------------------------------------------------------------------------------------------


def exact_returns(batch: Batch) -> Tensor:
    """Lambda-returns [B, T] in float64, by the recursion over valid tokens in Python's own floats."""
    exact = torch.empty(batch.values.shape, dtype=torch.float64)
    for row, carry in enumerate(batch.rewards.tolist()):
        returns = []
        for value, valid in zip(batch.values[row].tolist()[::-1], batch.loss_mask[row].tolist()[::-1], strict=True):
            if valid:
                returns.append(carry)
                carry = GAMMA * ((1 - LAM) * value + LAM * carry)
            else:
                returns.append(0.0)
        exact[row] = torch.tensor(returns[::-1], dtype=torch.float64)
    return exact


def exact_loss(batch: Batch, returns: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, 0-dim, and its gradient [B, T] in float64, from exact returns [B, T]."""
    counted = batch.attention_mask & batch.loss_mask
    error = torch.where(counted, batch.values.double() - returns, 0.0)
    return (error**2).sum() / counted.sum(), 2 * error / counted.sum()


def check(name: str, answer: Tensor, exact: Tensor) -> float:
    """Return the error of an answer relative to the largest exact number; stop the benchmark if it is wrong."""
    if answer.shape != exact.shape:
        raise SystemExit(f"{name} is wrong: its shape is {list(answer.shape)}, not {list(exact.shape)}")
    error = ((answer.double() - exact).abs().max() / exact.abs().max()).item()
    if not error <= LIMITS[answer.dtype]:  # also refuses NaN
        raise SystemExit(f"{name} is wrong by {error:.2g} for {list(exact.shape)} {answer.dtype}: nothing is timed")
    return error


def forward_and_backward(loss: Callable[[Tensor], Tensor], leaf: Tensor) -> Callable[[], Tensor]:
    """What a training step does with a loss of a leaf that requires a gradient, and returns: its gradient."""

    def step() -> Tensor:
        leaf.grad = None
        with torch.enable_grad():
            loss(leaf).backward()
        return leaf.grad

    return step


# ---- time --------------------------------------------------------------------------------------------------------


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Keep the calling thread on one core while `threads` is 1, where the system can."""
    if threads > 1 or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def interleave(
    contestants: Sequence[Contestant], seconds: float, at_least: int = 3, at_most: int = 1000
) -> list[Timing]:
    """Time contestants in turn, so that what disturbs the machine disturbs all of them alike.

    Every round times one batch of calls of each, in an order of its own, after one untimed call that brings its data
    back into the caches. A contestant drops out after `seconds` of its own, but not before `at_least` batches.
    """
    shuffle = random.Random(0).shuffle
    calls = [max(1, min(1000, int(BATCH_SECONDS / contestant.seconds(1)))) for contestant in contestants]
    samples: list[list[float]] = [[] for _ in contestants]
    spent = [0.0] * len(contestants)
    for _ in range(at_most):
        entering = [i for i in range(len(contestants)) if spent[i] < seconds or len(samples[i]) < at_least]
        if not entering:
            break
        shuffle(entering)
        for i in entering:
            if calls[i] > 1:  # a call that fills a batch alone evicts its own data
                contestants[i].seconds(1)
            elapsed = contestants[i].seconds(calls[i])
            samples[i].append(elapsed / calls[i])
            spent[i] += elapsed
    return [Timing(min(times), statistics.median(times), len(times)) for times in samples]


# ---- what ran where ----------------------------------------------------------------------------------------------


def commit() -> str:
    """The commit that is measured, with -dirty after it where sources differ; the version outside a checkout."""
    folder = Path(__file__).parent
    command = ["git", "rev-parse", "--short=10", "HEAD"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        return lr.__version__
    # The results themselves, and the pages that quote them, are no sources.
    sources = [":/csrc", ":/lambda_return_ext", ":/benchmarks/*.py", ":/setup.py"]
    changed = subprocess.run(["git", "status", "--porcelain", "--", *sources], cwd=folder, capture_output=True).stdout
    return done.stdout.strip() + ("-dirty" if changed else "")


def _processor() -> str:
    """Name, family and model of the processor: cloud machines hide what the name leaves out."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name", platform.machine())
    family = f" (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else ""
    return name + family


def machine() -> dict[str, str | int]:
    """The columns that say what was measured, and on what."""
    info = lr.build_info()
    return {
        "machine": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "instruction_set": str(info["instruction_set"]),
        "torch": str(info["torch"]),
        "python": platform.python_version(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "commit": commit(),
    }


def write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows, whose columns are those of the first, to a temporary name first."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)
