"""Times the operators on the CPU: against other ways to the same targets, against copies, and against themselves.

    make bench                                     # everything: CSV, tables and plots in benchmarks/results
    make bench QUICK=1                             # half a minute, small shapes, no packages: build/benchmarks
    python benchmarks/cpu.py --only peers tokens   # some of the scenarios

Every answer is checked against float64 before anything is timed; a wrong one ends the run. Contestants take turns. What
a contestant needs converted (masks to floats, rewards to tokens) is converted before the clock starts.

Copies are timed beside the operators, as the floor: a copy of half as many bytes as the operator moves reads and writes
as many in all. "Copy" goes into a new tensor, as an operator's result does, and pays for the pages of the new tensor
when it is large; "copy in place" goes into one that is there already.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch
import torch.nn.functional as F
from general import answers, cases, masked_mean
from harness import (
    GAMMA,
    LAM,
    Batch,
    Contestant,
    check,
    exact_loss,
    exact_returns,
    forward_and_backward,
    interleave,
    machine,
    pinned,
    write_csv,
)
from peers import PEERS, UnavailableError
from torch import Tensor

import lambda_return_ext as lr
from lambda_return_ext._registrations import call as operator_call
from lambda_return_ext.categorical import Bins, categorical_values, compute_categorical_value_loss

ops = torch.ops.lambda_return
RESULTS = Path(__file__).with_name("results")
QUICK_RESULTS = Path(__file__).parents[1] / "build" / "benchmarks"
DENSITY = 0.7  # of "gaps"
FAST_PEERS = ("numba loop, as in tianshou", "rlax lambda_returns, jit + vmap", "torch-discounted-cumsum")


@dataclass(frozen=True)
class Plan:
    """Which shapes, and how long each contestant is timed for each of them."""

    seconds: float
    main_shapes: Sequence[tuple[int, int]]  # [B, T]
    memory_shapes: Sequence[tuple[int, int]]
    columns: Sequence[int]  # T, at 16 rows
    rows: Sequence[int]  # B, at 1024 columns
    densities: Sequence[float]
    density_shapes: Sequence[tuple[int, int]]
    general_shapes: Sequence[tuple[int, int]]  # small ones: the reference takes seconds for each of many cases
    slow_peers: bool  # whether those that take seconds a call enter
    tokens_peers: bool


FULL = Plan(
    seconds=0.5,
    main_shapes=((64, 1024), (16, 8192), (512, 256)),
    memory_shapes=((64, 131072), (512, 8192), (1, 1048576)),
    columns=tuple(4**k for k in range(4, 11)),
    rows=tuple(4**k for k in range(7)),
    densities=(0.05, 0.1, 0.25, 0.5, 0.7, 0.9, 0.99, 1.0),
    density_shapes=((16, 8192), (512, 8192)),
    general_shapes=((64, 1024), (16, 8192)),
    slow_peers=True,
    tokens_peers=True,
)
QUICK = Plan(
    seconds=0.02,
    main_shapes=((64, 256),),
    memory_shapes=((64, 16384),),
    columns=(256, 4096),
    rows=(1, 64),
    densities=(0.05, 1.0),
    density_shapes=((16, 8192),),
    general_shapes=((16, 128),),
    slow_peers=False,
    tokens_peers=False,
)


# ---- batches and our contestants ---------------------------------------------------------------------------------


def make_mask(kind: str, B: int, T: int, density: float = DENSITY) -> Tensor:
    """A mask [B, T]: "dense", "gaps" at random, or "runs", where blocks of 64 tokens are valid or not as a whole."""
    generator = torch.Generator().manual_seed(1)
    if kind == "dense":
        return torch.ones(B, T, dtype=torch.bool)
    if kind == "gaps":
        return torch.rand(B, T, generator=generator) < density
    blocks = torch.rand(B, -(-T // 64), generator=generator) < density
    return blocks.repeat_interleave(64, dim=1)[:, :T].contiguous()


def make_batch(B: int, T: int, dtype: torch.dtype, mask: Tensor) -> Batch:
    """Values in [0, 1), rewards 0 or 1, and an attention mask that cuts off some more tokens where there are gaps."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(B, T, generator=generator).to(dtype)
    rewards = torch.randint(0, 2, (B,), generator=generator).to(dtype)
    attention_mask = torch.ones_like(mask) if mask.all() else torch.rand(B, T, generator=generator) < 0.95
    return Batch(values, rewards, attention_mask, mask)


def _version() -> str:
    return f"lambda_return_ext {lr.__version__}"


def _ours(name: str, call: Callable[[], Tensor], bytes_a_token: int, writes: bool) -> Contestant:
    floor = _copy_name(bytes_a_token, fresh=writes)
    return Contestant(name, _version(), call, bytes_a_token=bytes_a_token, floor=floor)


def lambda_return(batch: Batch) -> Contestant:
    """The public function, forward."""
    arguments = (batch.values, batch.rewards, batch.loss_mask, GAMMA, LAM)
    bytes_a_token = 2 * batch.values.element_size() + 1
    return _ours("lambda_return", lambda: lr.compute_lambda_return(*arguments), bytes_a_token, writes=True)


def loss_forward(batch: Batch) -> Contestant:
    """The public function without gradient, with two masks. It writes nothing of size [B, T]."""
    bytes_a_token = batch.values.element_size() + 2
    return _ours("loss forward", lambda: lr.compute_lambda_value_loss(*batch, GAMMA, LAM), bytes_a_token, writes=False)


def loss_backward(batch: Batch) -> Contestant:
    """The operator that a loss's backward() calls, without autograd's own work, which the overhead scenario times.

    The incoming gradient is the number of tokens: a mean over millions of them would underflow in float16.
    """
    loss, count = ops.lambda_value_loss(*batch, GAMMA, LAM)
    arguments = (count.to(loss.dtype), count, *batch, GAMMA, LAM)
    bytes_a_token = 2 * batch.values.element_size() + 2
    operator = ops.lambda_value_loss_backward.default
    return _ours("loss backward", lambda: operator_call(operator, *arguments), bytes_a_token, writes=True)


def composed_classification(logits: Tensor, batch: Batch, bins: Bins) -> Tensor:
    """The classification loss by torch's own operations but for the returns, in float32 for 16-bit logits."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    values = categorical_values(x.detach(), bins)
    targets = lr.compute_lambda_return(values, batch.rewards, batch.loss_mask, GAMMA, LAM)
    return masked_mean(-(bins.probabilities(targets, x.shape[-1]) * x.log_softmax(-1)).sum(-1), batch)


def _copy_name(bytes_a_token: int, fresh: bool) -> str:
    return f"copy{'' if fresh else ' in place'}, {bytes_a_token} bytes a token"


def copy(tokens: int, bytes_a_token: int, fresh: bool) -> Contestant:
    """A copy of half the bytes, which moves all of them."""
    source = torch.ones(tokens * bytes_a_token // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    return Contestant(
        _copy_name(bytes_a_token, fresh),
        f"torch {torch.__version__}",
        source.clone if fresh else lambda: target.copy_(source),
        bytes_a_token=bytes_a_token,
    )


# ---- measuring ---------------------------------------------------------------------------------------------------


class Group:
    """Contestants on one batch with one number of threads: checked, timed in turn, printed, and kept as rows."""

    def __init__(self, plan: Plan, scenario: str, batch: Batch, mask: str, threads: int = 1):
        self.plan, self.batch, self.threads = plan, batch, threads
        B, T = batch.values.shape
        density = round(batch.loss_mask.float().mean().item(), 3)
        dtype = str(batch.values.dtype).removeprefix("torch.")
        columns = {"B": B, "T": T, "dtype": dtype, "mask": mask, "density": density, "threads": threads}
        self.columns = {"scenario": scenario, **columns}
        self.contestants: list[Contestant] = []
        self.rows: list[dict] = []
        print(f"\n{scenario}: {B} x {T} {dtype}, {mask} ({density:.0%} valid), {threads} thread(s)", flush=True)
        torch.set_num_threads(threads)
        torch.compiler.reset()  # what was compiled for other shapes counts against a limit

    def enter(self, exact: Tensor, *contestants: Contestant) -> None:
        """Check contestants against one exact answer and let them in."""
        for contestant in contestants:
            check(contestant.name, contestant.answer(contestant.call()), exact)
            self.contestants.append(contestant)

    def enter_ours(self) -> Tensor:
        """Check and let in the three operators; return the exact lambda-returns."""
        exact = exact_returns(self.batch)
        loss, gradient = exact_loss(self.batch, exact)
        self.enter(exact, lambda_return(self.batch))
        self.enter(loss, loss_forward(self.batch))
        count = (self.batch.attention_mask & self.batch.loss_mask).sum()
        self.enter(gradient * count, loss_backward(self.batch))
        return exact

    def enter_copies(self) -> None:
        """Let in the copies that are the floors of the three operators; of the forward only the one in place counts."""
        size, tokens = self.batch.values.element_size(), self.batch.values.numel()
        for bytes_a_token, fresh in (
            (2 * size + 1, True), (2 * size + 1, False), (size + 2, False), (2 * size + 2, True),
        ):  # fmt: skip
            contestant = copy(tokens, bytes_a_token, fresh)
            contestant.call()
            self.contestants.append(contestant)

    def enter_peers(self, exact: Tensor, names: Iterable[str] | None = None) -> None:
        """Check and let in the peers that can do this batch; those that cannot run here become rows that say so."""
        for peer in PEERS:
            wanted = (names is None or peer.name in names) and self.columns["T"] <= peer.most_columns
            if not wanted or not (peer.gaps or self.columns["mask"] == "dense"):
                continue
            try:
                self.enter(exact, peer.prepare(self.batch))
            except UnavailableError as reason:
                self.add(peer.name, "", str(reason))

    def add(self, name: str, version: str, status: str, **numbers: float) -> None:
        """Keep one row, its numbers empty where there is none, and print it."""
        columns = ("floor", "bytes_a_token", "samples", "min_us", "median_us", "times_lambda_return", "times_copy")
        row = {**self.columns, "contestant": name, "version": version, "status": status}
        self.rows.append({**row, **dict.fromkeys(columns, ""), **numbers})
        if not numbers:
            print(f"  {name:42} {status}", flush=True)

    def time(self) -> list[dict]:
        """Time all and return the rows."""
        with torch.no_grad(), pinned(self.threads):
            timings = interleave(self.contestants, self.plan.seconds)
        fastest = {c.name: timing.minimum for c, timing in zip(self.contestants, timings, strict=True)}
        for contestant, timing in zip(self.contestants, timings, strict=True):
            numbers = {
                "floor": contestant.floor,
                "bytes_a_token": contestant.bytes_a_token or "",
                "samples": timing.samples,
                "min_us": round(timing.minimum * 1e6, 3),
                "median_us": round(timing.median * 1e6, 3),
            }
            ratios = ""
            for column, base, text in (
                ("times_lambda_return", "lambda_return", "lambda_return"),
                ("times_copy", contestant.floor, "copy"),
            ):
                if base in fastest and base != contestant.name:
                    numbers[column] = round(timing.minimum / fastest[base], 3)
                    ratios += f"{numbers[column]:10.2f} x {text}"
            print(
                f"  {contestant.name:42} min {numbers['min_us']:12.1f}  median {numbers['median_us']:12.1f} us{ratios}",
                flush=True,
            )
            self.add(contestant.name, contestant.version, "ok", **numbers)
        return self.rows


def thread_counts() -> list[int]:
    """One, two, and all cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({1, 2, cores} & set(range(1, cores + 1)))


# ---- scenarios ---------------------------------------------------------------------------------------------------


def peers(plan: Plan) -> list[dict]:
    """Lambda-returns by every way there is, one thread."""
    rows = []
    for mask in ("dense", "gaps"):
        for B, T in plan.main_shapes:
            group = Group(plan, "peers", make_batch(B, T, torch.float32, make_mask(mask, B, T)), mask)
            exact = group.enter_ours()
            group.enter_copies()
            group.enter_peers(exact, None if plan.slow_peers else [p.name for p in PEERS if "double" not in p.name])
            rows += group.time()
    return rows


def memory(plan: Plan) -> list[dict]:
    """The operators against copies, where the data leave the caches, on one thread and more."""
    rows = []
    for B, T in plan.memory_shapes:
        for mask in ("dense", "gaps"):
            batch = make_batch(B, T, torch.float32, make_mask(mask, B, T))
            for threads in thread_counts():
                group = Group(plan, "memory", batch, mask, threads)
                group.enter_ours()
                group.enter_copies()
                rows += group.time()
    return rows


def tokens(plan: Plan) -> list[dict]:
    """Cost against T at 16 rows, and against B at 1024 columns."""
    rows = []
    shapes = [("columns", 16, T) for T in plan.columns] + [("rows", B, 1024) for B in plan.rows]
    for kind, B, T in shapes:
        group = Group(plan, f"tokens: {kind}", make_batch(B, T, torch.float32, make_mask("dense", B, T)), "dense")
        exact = group.enter_ours()
        group.enter_copies()
        if plan.tokens_peers:
            compiled = [p.name for p in PEERS if "compile" in p.name] if kind == "columns" else []
            group.enter_peers(exact, [*FAST_PEERS, *compiled])
        rows += group.time()
    return rows


def dtypes(plan: Plan) -> list[dict]:
    """The operators in every dtype, against copies of as many bytes."""
    rows = []
    for B, T in plan.density_shapes:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for mask in ("dense", "gaps"):
                group = Group(plan, "dtypes", make_batch(B, T, dtype, make_mask(mask, B, T)), mask)
                group.enter_ours()
                group.enter_copies()
                rows += group.time()
    return rows


def density(plan: Plan) -> list[dict]:
    """The operators against the share of valid tokens, at random and in runs of 64."""
    rows = []
    for B, T in plan.density_shapes:
        for mask in ("gaps", "runs"):
            for share in plan.densities:
                batch = make_batch(B, T, torch.float32, make_mask(mask, B, T, share))
                group = Group(plan, "density", batch, mask)
                group.enter_ours()
                group.enter_copies()
                rows += group.time()
    return rows


def overhead(plan: Plan) -> list[dict]:
    """What a call costs where there is next to nothing to compute."""
    batch = make_batch(1, 8, torch.float32, make_mask("dense", 1, 8))
    group = Group(plan, "overhead", batch, "dense")
    exact = exact_returns(batch)
    loss, gradient = exact_loss(batch, exact)
    values = batch.values.clone().requires_grad_()
    targets = torch.zeros_like(batch.values)

    def ours(x: Tensor) -> Tensor:
        return lr.compute_lambda_value_loss(x, *batch[1:], GAMMA, LAM)

    def mse(x: Tensor) -> Tensor:
        return F.mse_loss(x, targets)

    name = f"torch {torch.__version__}"
    group.enter(exact, lambda_return(batch))
    group.enter(
        exact,
        Contestant(
            "torch.ops.lambda_return.lambda_return",
            _version(),
            lambda: ops.lambda_return(batch.values, batch.rewards, batch.loss_mask, GAMMA, LAM),
        ),
    )
    group.enter(loss, loss_forward(batch))
    group.enter(gradient, Contestant("loss forward + backward", _version(), forward_and_backward(ours, values)))
    exact_mse = (batch.values.double() ** 2).mean()
    group.enter(exact_mse, Contestant("F.mse_loss forward", name, lambda: F.mse_loss(batch.values, targets)))
    group.enter(
        2 * batch.values.double() / 8,
        Contestant("F.mse_loss forward + backward", name, forward_and_backward(mse, values)),
    )
    return group.time()


def classification(plan: Plan) -> list[dict]:
    """Cross-entropy of 51 logits a token against the lambda-returns, fused and composed, one thread."""
    rows = []
    B, T = plan.main_shapes[0]
    for target in ("hl_gauss", "two_hot"):
        for dtype in (torch.float32, torch.bfloat16):
            batch, bins = make_batch(B, T, dtype, make_mask("dense", B, T)), Bins(-1.0, 2.0, target)
            group = Group(plan, f"classification: {target}", batch, "dense")
            logits = torch.randn(B, T, 51, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
            wide = logits.detach().double().requires_grad_()
            exact = composed_classification(wide, batch, bins)
            (exact_grad,) = torch.autograd.grad(exact, wide)

            def fused(x: Tensor, batch: Batch = batch, bins: Bins = bins) -> Tensor:
                return compute_categorical_value_loss(x, *batch[1:], GAMMA, LAM, bins=bins)

            def composed(x: Tensor, batch: Batch = batch, bins: Bins = bins) -> Tensor:
                return composed_classification(x, batch, bins)

            size, values = 51 * dtype.itemsize, logits.detach()
            torch_version = f"torch {torch.__version__}"
            group.enter(
                exact.detach(),
                _ours("fused, forward", partial(fused, values), size, writes=False),
                Contestant("composed, forward", torch_version, partial(composed, values)),
            )
            group.enter(
                exact_grad,
                _ours("fused, forward + backward", forward_and_backward(fused, logits), 3 * size, writes=True),
                Contestant("composed, forward + backward", torch_version, forward_and_backward(composed, logits)),
            )
            for bytes_a_token, fresh in ((size, False), (3 * size, True)):
                group.contestants.append(copy(B * T, bytes_a_token, fresh))
            rows += group.time()
    return rows


def general(plan: Plan) -> list[dict]:
    """Every option of the general operators, with gaps, beside the plain return and loss, one thread."""

    def answer(result: Any) -> Tensor:
        return torch.stack(answers(result)).detach()

    rows = []
    for B, T in plan.general_shapes:
        mask = make_mask("gaps", B, T)
        # Without the tokens that no attention mask has, so that the packed loss is over the same tokens.
        batch = make_batch(B, T, torch.float32, mask)._replace(attention_mask=torch.ones_like(mask))
        group = Group(plan, "general", batch, "gaps")
        group.enter(exact_returns(batch), lambda_return(batch))
        for name, case in cases(batch).items():
            ways = [(name, _version(), case.ours)]
            if case.composed:
                ways.append((f"composed: {name}", f"torch {torch.__version__}", case.composed))
            group.enter(answer(case.exact()), *(Contestant(*way, answer) for way in ways))
        rows += group.time()
    return rows


SCENARIOS = {
    "peers": peers,
    "memory": memory,
    "tokens": tokens,
    "dtypes": dtypes,
    "density": density,
    "overhead": overhead,
    "classification": classification,
    "general": general,
}


def run(plan: Plan, folder: Path, names: Iterable[str]) -> None:
    """Measure scenarios and write one CSV for each."""
    facts = machine()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    for name in names:
        load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else ""
        rows = SCENARIOS[name](plan)
        write_csv(folder / f"{name}.csv", ({**row, "load_before": load, **facts} for row in rows))


def main() -> None:
    """Measure, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes and few repetitions")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="these scenarios")
    parser.add_argument("--output", type=Path, help="folder for CSV and plots")
    arguments = parser.parse_args()
    folder = arguments.output or (QUICK_RESULTS if arguments.quick else RESULTS)
    run(QUICK if arguments.quick else FULL, folder, arguments.only)
    report.write(folder)
    if folder.resolve() == RESULTS:
        report.update_pages(folder)


if __name__ == "__main__":
    main()
