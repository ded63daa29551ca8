"""Times the operators on a CUDA device: every answer is checked first, then device time and full-call time.

    python benchmarks/gpu.py                   # tables, and gpu.csv beside this file
    python benchmarks/gpu.py --quick           # three shapes, few repetitions

Device time comes from CUDA events around a CUDA graph of many calls, full-call time from the host's clock around calls
without a graph: of ours, of the public function, and for a loss its backward() too. Inputs and outputs rotate through
more than twice the L2 cache; the smallest shapes, where it is the launch that takes the time, through 512 places at
most, and the loop over T, which launches thousands of kernels a call, through two. The bandwidth that a result is
compared with is measured in the same run, by copying as many bytes. What the options of the general operators cost is
measured through the public functions, autograd and the filling of 0-dim gamma and lam included.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from general import Case, answers, cases
from harness import GAMMA, LAM, Answers, Batch, check, commit, forward_and_backward, write_csv
from peers.compiled import ASSOCIATIVE_SCAN, LOG2_DOUBLING, associative_scan, log2_doubling
from peers.loops import return_loop
from torch import Tensor

import lambda_return_ext as lr
from lambda_return_ext.categorical import TARGETS, Bins, categorical_values, compute_categorical_value_loss

ops = torch.ops.lambda_return
LOOP = "return loop over T"
MOST_LOOP_COLUMNS = 4096
SHAPES = [(512, 4096), (4096, 2048), (16384, 512), (16, 65536), (16, 131072), (16, 524288), (1, 8), (64, 512)]
QUICK_SHAPES = [(512, 4096), (16, 131072), (1, 8)]
# Of the classification loss, whose logits are K times as many.
K, LOGIT_SHAPES, QUICK_LOGIT_SHAPES = 51, [(512, 4096), (4096, 512), (16, 65536), (16, 512)], [(64, 2048)]
# Of the options, in float32: shapes at which the plain operators are timed too, but for --quick.
GENERAL_SHAPES, QUICK_GENERAL_SHAPES = [(512, 4096), (16, 131072)], [(64, 2048)]
# The goals, on an H100: share of the measured copy bandwidth at the large shapes; milliseconds.
GOAL_SHARE, GOAL_16x131072_MS, GOAL_CALL_US = 0.85, 0.015, 12.0


# ---- contestants: (values, rewards, mask), or a case of the options, -> the answers --------------------------------

Contestant = Callable[..., Answers]
RETURN, LOSS = "lambda_return", "lambda_value_loss forward + backward"
CLASSIFICATION = "categorical_value_loss forward + backward"  # of logits [B, T, K] in place of values
BINS = Bins()
Inputs = tuple[Tensor, Tensor, Tensor]  # values or logits, rewards, and one mask that serves as both


def general_cases(batch: Inputs) -> dict[str, Case]:
    """The options of the general operators by the name of the work."""
    values, rewards, mask = batch
    return {f"general: {name}": case for name, case in cases(Batch(values, rewards, mask, mask)).items()}


GENERAL = general_cases((torch.zeros(1, 1), torch.zeros(1), torch.ones(1, 1, dtype=torch.bool)))


def prepare(work: str, batch: Inputs) -> tuple:
    """What the contestants of this work take."""
    return (general_cases(batch)[work],) if work in GENERAL else batch


def ours(values: Tensor, rewards: Tensor, mask: Tensor) -> Answers:
    """The public function, checks included."""
    return (lr.compute_lambda_return(values, rewards, mask, GAMMA, LAM),)


def loss_of_ours(one: Tensor) -> Contestant:
    """Loss and its gradient by the operators, for a gradient of `one` that comes in."""

    def loss(values: Tensor, rewards: Tensor, mask: Tensor) -> Answers:
        mean, count = ops.lambda_value_loss(values, rewards, mask, mask, GAMMA, LAM)
        return mean, ops.lambda_value_loss_backward(one, count, values, rewards, mask, mask, GAMMA, LAM)

    return loss


def return_of(scan: Callable[..., Tensor]) -> Contestant:
    """A scan in plain torch."""
    return lambda values, rewards, mask: (scan(values, rewards, mask),)


def loss_of(scan: Callable[..., Tensor]) -> Contestant:
    """Loss and its gradient on top of a scan in plain torch; in closed form, so that no autograd is timed."""

    def loss(values: Tensor, rewards: Tensor, mask: Tensor) -> Answers:
        x = values.float()  # as the operators do: from returns that no 16-bit type has rounded
        error = torch.where(mask, x - scan(x, rewards, mask), 0.0)
        count = mask.sum().clamp(min=1)
        return (error * error).sum() / count, (2 * error / count).to(values.dtype)

    return loss


def classification_of_ours(one: Tensor) -> Contestant:
    """The classification loss and its gradient by the operators."""
    gamma, lam = (torch.tensor(x, dtype=torch.float64, device=one.device) for x in (GAMMA, LAM))
    bins = (TARGETS.index(BINS.target), BINS.low, BINS.high, BINS.sigma)

    def loss(logits: Tensor, rewards: Tensor, mask: Tensor) -> Answers:
        scan = (rewards, mask, None, None, None, gamma, lam, None)
        mean, scale, _statistics, *saved = ops.categorical_value_loss(logits, *scan, *bins)
        return mean, ops.categorical_value_loss_backward(one, scale, logits, *saved, None, *bins)

    return loss


def classification_of(scan: Callable[..., Tensor]) -> Contestant:
    """The same on top of a scan in plain torch, in closed form."""

    def loss(logits: Tensor, rewards: Tensor, mask: Tensor) -> Answers:
        x = logits.float()
        q = BINS.probabilities(scan(categorical_values(x, BINS), rewards, mask), x.shape[-1])
        count = mask.sum().clamp(min=1)
        losses = torch.where(mask, -(q * x.log_softmax(-1)).sum(-1), 0.0)
        gradient = torch.where(mask[..., None], (x.softmax(-1) - q) / count, 0.0)
        return losses.sum() / count, gradient.to(logits.dtype)

    return loss


OURS = {RETURN: lambda _one: ours, LOSS: loss_of_ours, CLASSIFICATION: classification_of_ours}
ON_TOP = {RETURN: return_of, LOSS: loss_of, CLASSIFICATION: classification_of}
PUBLIC_LOSSES = {
    LOSS: lambda values, rewards, mask: lr.compute_lambda_value_loss(values, rewards, mask, mask, GAMMA, LAM),
    CLASSIFICATION: lambda logits, rewards, mask: compute_categorical_value_loss(
        logits, rewards, mask, mask, GAMMA, LAM, bins=BINS
    ),
}


def full_call(work: str, batch: Inputs) -> Callable[[], Tensor]:
    """What a user calls for a loss: the public function and autograd's backward()."""
    values, *others = batch
    return forward_and_backward(lambda x: PUBLIC_LOSSES[work](x, *others), values.detach().requires_grad_())


def contestants(work: str) -> Iterator[tuple[str, Contestant]]:
    """Everyone who does this work, ours first."""
    if work in GENERAL:
        yield work, lambda case: answers(case.ours())
        if GENERAL[work].composed:
            yield "composed", lambda case: answers(case.composed())
        return
    yield work, OURS[work](torch.ones((), device="cuda"))
    on_top = ON_TOP[work]
    for name, scan in ((LOG2_DOUBLING, log2_doubling), (ASSOCIATIVE_SCAN, associative_scan)):
        yield name, torch.compile(on_top(scan), dynamic=False, fullgraph=True)
    yield LOOP, on_top(return_loop)


def exact(work: str, batch: Inputs) -> Answers:
    """What a contestant must give: the CPU operators in float64."""
    values, rewards, mask = (x.cpu() for x in batch)
    if work in GENERAL:
        return answers(general_cases((values.double(), rewards, mask))[work].ours())
    return OURS[work](torch.ones(()))(values.double(), rewards, mask)


# ---- measuring ---------------------------------------------------------------------------------------------------


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, copies: int) -> list[Inputs]:
    """Batches with gaps, prompts and padding, in `copies` different places in memory: [B, T] values or logits."""
    B, T = shape[:2]
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        (
            torch.rand(shape, generator=generator, device="cuda").to(dtype),
            torch.randint(0, 2, (B,), generator=generator, device="cuda").float(),
            torch.rand(B, T, generator=generator, device="cuda") < 0.8,
        )
        for _ in range(copies)
    ]


def device_ms(call: Callable, inputs: list[tuple], repeats: int) -> tuple[float, float]:
    """Minimum and median over repeats of one call's device time, from a graph that calls once for every input."""
    call(*inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call(*batch) for batch in inputs]  # kept, so that no two share memory
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(outputs))
    return min(times), statistics.median(times)


def call_us(call: Callable[[], object], repeats: int) -> float:
    """Median host time of one call without a graph, the device kept from becoming the bottleneck."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            call()
        times.append((time.perf_counter() - start) / 20 * 1e6)
    return statistics.median(times)


def copy_ms(bytes_moved: int, copies: int, repeats: int) -> float:
    """Device time of a copy that reads and writes `bytes_moved` bytes in all, minimum over repeats."""
    pairs = [
        (
            torch.empty(bytes_moved // 2, dtype=torch.uint8, device="cuda"),
            torch.empty(bytes_moved // 2, dtype=torch.uint8, device="cuda"),
        )
        for _ in range(copies)
    ]
    return device_ms(lambda target, source: target.copy_(source), pairs, repeats)[0]


def check_all(name: str, answers: Answers, right: Answers) -> None:
    """Stop if one of the answers is wrong."""
    for answer, exact_answer in zip(answers, right, strict=True):
        check(name, answer.cpu(), exact_answer)


def measure(B: int, T: int, dtype: torch.dtype, work: str, quick: bool) -> list[dict]:
    """All contestants at one shape and dtype."""
    size = torch.finfo(dtype).bits // 8
    width = K if work == CLASSIFICATION else 1
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(2, min(512, 2 * l2_bytes // (B * T * (width * size + 1)) + 1))
    inputs = make_inputs((B, T, K) if work == CLASSIFICATION else (B, T), dtype, copies)
    right = exact(work, inputs[0])
    prepared = [prepare(work, batch) for batch in inputs]
    if work in GENERAL:
        bytes_a_token = prepared[0][0].bytes_moved / (B * T)
    else:  # of logits, see docs/performance.md, without those that are read again
        bytes_a_token = {RETURN: 2 * size + 1, LOSS: 3 * size + 2, CLASSIFICATION: 3 * K * size + 36}[work]
    repeats = 5 if quick else 30
    floor = copy_ms(round(B * T * bytes_a_token), copies, repeats)
    torch._dynamo.reset()  # a function is compiled for a few shapes only, and then refused
    rows = []
    for name, call in contestants(work):
        is_loop = name == LOOP
        if is_loop and T > MOST_LOOP_COLUMNS:
            print(f"  {name:37s} not run: it launches several kernels for each of {T} columns")
            continue
        try:
            check_all(name, call(*prepared[0]), right)
            shortest, median = device_ms(call, prepared[:2] if is_loop else prepared, 3 if is_loop else repeats)
            called = partial(call, *prepared[0])
            if name in PUBLIC_LOSSES:
                called = full_call(work, inputs[0])
                check_all(f"{name}, full call", (called(),), right[-1:])
            microseconds = call_us(called, 3 if is_loop else repeats)
        except (Exception, SystemExit) as error:  # a compiler may fail in any way; that must not end the benchmark
            if name == work:
                raise
            print(f"  {name:37s} not run, {type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}")
            continue
        rows.append(
            {
                "B": B, "T": T, "dtype": str(dtype).removeprefix("torch."), "work": work, "contestant": name,
                "device_ms_min": shortest, "device_ms_median": median, "copy_ms": floor,
                "share_of_copy": floor / shortest, "call_us": microseconds, "bytes_a_token": bytes_a_token,
            }
        )  # fmt: skip
        print(
            f"  {name:37s} device {shortest:9.4f} ms (median {median:.4f})  {floor / shortest:6.1%} of copy  "
            f"call {microseconds:8.1f} us"
        )
    return rows


def goals(rows: list[dict]) -> Iterator[str]:
    """One line for each goal that applies to a result of ours, with the result beside it."""
    for row in rows:
        if row["contestant"] not in (RETURN, LOSS):
            continue
        B, T, name = row["B"], row["T"], f"{row['work']} {row['B']} x {row['T']} {row['dtype']}"
        results = []
        if B * T >= 2**20:
            share = row["share_of_copy"]
            results.append((f"share of copy >= {GOAL_SHARE:.0%}", f"{share:.1%}", share >= GOAL_SHARE))
        if (B, T, row["work"]) == (16, 131072, RETURN):
            time_ms = row["device_ms_min"]
            results.append((f"device <= {GOAL_16x131072_MS} ms", f"{time_ms:.4f} ms", time_ms <= GOAL_16x131072_MS))
        if B * T <= 2**15:
            call = row["call_us"]
            results.append((f"full call <= {GOAL_CALL_US} us", f"{call:.1f} us", call <= GOAL_CALL_US))
        for goal, result, is_met in results:
            yield f"{name}: {goal}: {result}, {'met' if is_met else 'missed'}"


def main() -> None:
    """Run all shapes, print tables with the goals beside them, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three shapes, few repetitions")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("gpu.csv"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or not lr._cuda.available:
        sys.exit("benchmarks/gpu.py needs a CUDA device and the CUDA kernels: nothing was measured")
    machine = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "commit": commit(),
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    shapes, logit_shapes, general_shapes = (
        (QUICK_SHAPES, QUICK_LOGIT_SHAPES, QUICK_GENERAL_SHAPES)
        if arguments.quick
        else (SHAPES, LOGIT_SHAPES, GENERAL_SHAPES)
    )
    works = []
    for dtype in (torch.float32, torch.bfloat16):
        works += [(dtype, shape, work) for shape in shapes for work in (RETURN, LOSS)]
        works += [(dtype, shape, CLASSIFICATION) for shape in logit_shapes]
    works += [(torch.float32, shape, work) for shape in general_shapes for work in GENERAL]
    rows = []
    for dtype, (B, T), work in works:
        print(f"{work}, {B} x {T}{f' x {K}' if work == CLASSIFICATION else ''} {dtype}")
        rows += [{**row, **machine} for row in measure(B, T, dtype, work, arguments.quick)]
        torch.cuda.empty_cache()
    write_csv(arguments.output, rows)
    print("\nGoals, on an H100:", *goals(rows), sep="\n")


if __name__ == "__main__":
    main()
