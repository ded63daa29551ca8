"""Times the operators on a CUDA device: every answer is checked first, then device time and full-call time.

    python benchmarks/gpu.py                   # tables, and gpu.csv beside this file
    python benchmarks/gpu.py --quick           # two shapes, few repetitions

Device time comes from CUDA events around a CUDA graph of many calls, full-call time from the host's clock around calls
without a graph. Inputs rotate through more than twice the L2 cache. The bandwidth that a result is compared with is
measured in the same run, by copying as many bytes.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import GAMMA, LAM, check, commit, write_csv
from peers.compiled import ASSOCIATIVE_SCAN, LOG2_DOUBLING, associative_scan, log2_doubling
from peers.loops import return_loop
from torch import Tensor

import lambda_return_ext as lr

ops = torch.ops.lambda_return
SHAPES = [(512, 4096), (4096, 2048), (16384, 512), (16, 65536), (16, 131072), (16, 524288), (1, 8), (64, 512)]
QUICK_SHAPES = [(512, 4096), (16, 65536)]
# The goals, on an H100: share of the measured copy bandwidth at the large shapes; milliseconds.
GOAL_SHARE, GOAL_16x131072_MS, GOAL_CALL_US = 0.85, 0.015, 12.0


# ---- our contestants; the others are those of the CPU -------------------------------------------------------------


def ours(values: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """lambda_return, forward."""
    return ops.lambda_return(values, rewards, mask, GAMMA, LAM)


def ours_loss(values: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """lambda_value_loss, forward and backward; one mask serves as both."""
    loss, count = ops.lambda_value_loss(values, rewards, mask, mask, GAMMA, LAM)
    return ops.lambda_value_loss_backward(torch.ones_like(loss), count, values, rewards, mask, mask, GAMMA, LAM)


# ---- measuring ---------------------------------------------------------------------------------------------------


def make_inputs(B: int, T: int, dtype: torch.dtype, copies: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Batches with gaps, prompts and padding, in `copies` different places in memory."""
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        (
            torch.rand(B, T, generator=generator, device="cuda").to(dtype),
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
        for batch in inputs:
            call(*batch)
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(inputs))
    return min(times), statistics.median(times)


def call_us(call: Callable, batch: tuple, repeats: int) -> float:
    """Median host time of one call without a graph, the device kept from becoming the bottleneck."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            call(*batch)
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


def exact(call: Callable, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """What a contestant must give: the CPU operators in float64."""
    values, rewards, mask = (x.cpu() for x in batch)
    return (ours_loss if call is ours_loss else ours)(values.double(), rewards.double(), mask)


def measure(B: int, T: int, dtype: torch.dtype, arguments: argparse.Namespace) -> list[dict]:
    """All contestants at one shape and dtype."""
    size = torch.finfo(dtype).bits // 8
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(2, min(512, 2 * l2_bytes // max(1, B * T * (size + 1)) + 1))
    inputs = make_inputs(B, T, dtype, copies)
    repeats = 5 if arguments.quick else 30
    contestants: list[tuple[str, Callable, int]] = [
        ("lambda_return", ours, 2 * size + 1),
        ("lambda_value_loss fwd+bwd", ours_loss, 3 * size + 2),
        (LOG2_DOUBLING, torch.compile(log2_doubling, dynamic=False), 2 * size + 1),
        (ASSOCIATIVE_SCAN, torch.compile(associative_scan, dynamic=False), 2 * size + 1),
    ]
    if T <= 4096:
        contestants.append(("return loop over T", return_loop, 2 * size + 1))
    rows = []
    for name, call, bytes_a_token in contestants:
        try:
            check(name, call(*inputs[0]).cpu(), exact(call, inputs[0]))
            few = inputs if call in (ours, ours_loss) else inputs[: max(2, copies // 8)]
            shortest, median = device_ms(call, few, repeats if call is not return_loop else 3)
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            print(f"  {name}: not run, {type(error).__name__}: {str(error).splitlines()[0][:80]}")
            continue
        floor = copy_ms(B * T * bytes_a_token, copies, repeats)
        rows.append(
            {
                "B": B, "T": T, "dtype": str(dtype).removeprefix("torch."), "contestant": name,
                "device_ms_min": shortest, "device_ms_median": median, "copy_ms": floor,
                "share_of_copy": floor / shortest,
                "call_us": call_us(call, inputs[0], repeats), "bytes_a_token": bytes_a_token,
            }
        )  # fmt: skip
        row = rows[-1]
        print(
            f"  {name:32s} device {shortest:9.4f} ms (median {median:.4f})  {row['share_of_copy']:6.1%} of copy  "
            f"call {row['call_us']:8.1f} us"
        )
    return rows


def main() -> None:
    """Run all shapes, print tables with the goals beside them, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes, few repetitions")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("gpu.csv"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or not lr._cuda.available:
        sys.exit("benchmarks/gpu.py needs a CUDA device and the CUDA kernels: nothing was measured")
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit()}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for B, T in QUICK_SHAPES if arguments.quick else SHAPES:
            print(f"{B} x {T} {dtype}")
            rows += [{**row, **machine} for row in measure(B, T, dtype, arguments)]
            torch.cuda.empty_cache()
    write_csv(arguments.output, rows)
    own = [row for row in rows if row["contestant"] == "lambda_return"]
    large = min(row["share_of_copy"] for row in own if row["B"] * row["T"] >= 2**20)
    print(f"\nH100 goals: share of copy at the large shapes >= {GOAL_SHARE:.0%}: {large:.0%}")
    for row in own:
        if (row["B"], row["T"], row["dtype"]) == (16, 131072, "float32"):
            print(f"16 x 131072 <= {GOAL_16x131072_MS} ms: {row['device_ms_min']:.4f} ms")
        if row["B"] * row["T"] <= 2**15:
            print(f"{row['B']} x {row['T']} {row['dtype']} call <= {GOAL_CALL_US} us: {row['call_us']:.1f} us")


if __name__ == "__main__":
    main()
