"""The CUDA kernels of the general operators, run on the CPU by the emulator, against their definitions in float64."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from emulated_kernels_testing import EmulatedKernels, build_emulated_kernels, laid_out, to_torch
from ops_testing import VALUE_DTYPES, accumulate_dtype
from torch import Tensor

ORDERS = ("ascending", "descending", "random")
KINDS = ("mse", "huber", "smooth_l1", "bce", "bce_logits")  # in the order of LossKind
REDUCTIONS = ("token mean", "sequence mean", "sum", "none")  # in the order of Reduction
# (offset, gap between rows) of the values, of the masks, of everything else.
LAYOUTS = {"dense": ((0, 0),) * 3, "shifted": ((5, 2),) * 3, "different": ((1, 3), (2, 1), (0, 0))}
DELTA, CLIP = 0.75, 0.25


@pytest.fixture(scope="module")
def kernels():
    kernels = EmulatedKernels(build_emulated_kernels())
    yield kernels
    kernels.close()


@pytest.fixture(autouse=True)
def schedule(kernels):
    kernels.use_schedule("random", 1, 4)


# ---- cases -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Sequences of these lengths, as a padded matrix of equal ones or packed with tokens before and after them."""

    lengths: tuple[int, ...]
    packed: bool = False
    outside: int = 0  # tokens before the first packed sequence, and after the last one
    dtype: torch.dtype = torch.float32
    masked: bool = True
    attended: bool = True
    rewarded: bool = True
    old: bool = False
    discount_per_row: bool = True
    gamma: float = 1.0
    lam: float = 0.95
    kind: str = "mse"
    reduction: str = "token mean"
    normalizer: float | None = None
    layout: str = "dense"
    seed: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        if self.packed:
            return 1, sum(self.lengths) + 2 * self.outside
        return len(self.lengths), self.lengths[0] if self.lengths else 3

    @cached_property
    def cu_seqlens(self) -> np.ndarray:
        return self.outside + np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]).astype(np.int64)

    def spans(self) -> list[tuple[int, slice]]:
        """Row and tokens of each sequence."""
        if self.packed:
            return [(0, slice(int(begin), int(end))) for begin, end in pairwise(self.cu_seqlens)]
        return [(row, slice(0, length)) for row, length in enumerate(self.lengths)]

    @cached_property
    def data(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        acc = accumulate_dtype(self.dtype)

        def draw(dtype: torch.dtype, like_probability: bool = False) -> Tensor:
            noise = torch.rand(self.shape, generator=generator, dtype=torch.float64)
            return (0.05 + 0.9 * noise if like_probability else 4 * noise - 2).to(dtype)

        B = len(self.lengths)
        valid = torch.rand(self.shape, generator=generator) < 0.7 if self.masked else torch.ones(self.shape) > 0
        counted = valid & (torch.rand(self.shape, generator=generator) < 0.8) if self.attended else valid
        bad = torch.tensor([float("nan"), float("inf"), float("-inf")])[torch.arange(valid.numel()) % 3].view(
            self.shape
        )
        per_row = torch.rand(2, B, generator=generator, dtype=torch.float64) * 0.02
        data = {
            "values": torch.where(valid, draw(self.dtype, self.kind == "bce"), bad.to(self.dtype)),
            "rewards": torch.where(valid, draw(acc) / 8, bad.to(acc)),
            "old": torch.where(counted, draw(self.dtype), bad.to(self.dtype)),
            "grad": torch.where(valid, draw(self.dtype), bad.to(self.dtype)),
            "grad_losses": torch.where(counted, draw(acc), bad.to(acc)),
            "valid": valid,
            "attended": counted | ~valid,
            "counted": counted,
            "terminal": torch.rand(B, generator=generator, dtype=torch.float64).to(acc),
            "gamma": torch.tensor(self.gamma, dtype=torch.float64),
            "lam": torch.tensor(self.lam, dtype=torch.float64),
            "other_lam": torch.tensor(0.5, dtype=torch.float64),
        }
        if self.discount_per_row:
            data["gamma"], data["lam"] = self.gamma * (1 - per_row[0]), self.lam * (1 - per_row[1])
        return data


def every_length(shares: list[int]) -> Iterator[int]:
    """Lengths on both sides of a thread's, warp's and block's share and of the change of plan."""
    yield from sorted({1, 2, *(share + step for share in shares for step in (-1, 0, 1))})


# ---- the kernels' outputs ----------------------------------------------------------------------------------------


def run(kernels, case: Case) -> dict[str, Tensor]:
    """Every output of every general operator."""
    data, (of_values, of_masks, of_others) = case.data, LAYOUTS[case.layout]
    place = {"valid": of_masks, "attended": of_masks, "rewards": of_others, "grad_losses": of_others}

    def matrix(name: str, present: bool = True):
        return laid_out(data[name], *place.get(name, of_values)) if present else None

    values, terminal = matrix("values"), data["terminal"].numpy()
    mask, rewards = matrix("valid", case.masked), matrix("rewards", case.rewarded)
    attended, old = matrix("attended", case.attended), matrix("old", case.old)
    cu_seqlens = case.cu_seqlens if case.packed else None
    gamma, lam, other_lam = (data[name].numpy() for name in ("gamma", "lam", "other_lam"))
    scan = (values, terminal, mask, rewards, cu_seqlens, gamma)
    loss_inputs = (values, terminal, mask, attended, rewards, old, cu_seqlens, gamma, lam)
    kind, reduction = KINDS.index(case.kind), REDUCTIONS.index(case.reduction)

    out = {"returns": kernels.td_lambda(*scan, lam, False), "advantages": kernels.td_lambda(*scan, lam, True)}
    out["pair returns"], out["pair advantages"] = kernels.td_lambda_pair(*scan, other_lam, lam)
    out["map"] = kernels.td_lambda_map(values, mask, rewards, cu_seqlens, gamma, lam)
    adjoint = (matrix("grad"), mask, cu_seqlens, gamma, lam)
    out["dV"], out["dR"], out["dr"] = kernels.td_lambda_backward(*adjoint, True)
    same_dV, same_dR, no_dr = kernels.td_lambda_backward(*adjoint, False)
    assert no_dr.size == 0
    assert same_dV.tobytes() == out["dV"].tobytes()
    assert same_dR.tobytes() == out["dR"].tobytes()
    out["loss"], out["scale"], out["statistics"] = kernels.td_lambda_loss(
        *loss_inputs, case.normalizer, kind, DELTA, CLIP, reduction
    )
    acc = accumulate_dtype(case.dtype)
    grad_loss = matrix("grad_losses") if case.reduction == "none" else torch.tensor(1.5, dtype=acc).numpy()
    out["loss gradient"] = kernels.td_lambda_loss_backward(grad_loss, out["scale"], *loss_inputs, kind, DELTA, CLIP)
    # Relative to the scale, which is as small as there are tokens.
    return {name: to_torch(x) for name, x in out.items()}


# ---- what they must be -------------------------------------------------------------------------------------------


def token_loss(case: Case, x: np.ndarray, g: np.ndarray, old: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """Loss, derivative and whether clipping decided, of each token."""
    never = np.zeros(x.shape, dtype=bool)
    if case.kind == "bce":
        return -g * np.log(x) - (1 - g) * np.log1p(-x), (x - g) / (x * (1 - x)), never
    if case.kind == "bce_logits":
        return np.logaddexp(0, x) - x * g, 1 / (1 + np.exp(-x)) - g, never

    def regression(e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if case.kind == "mse":
            return e**2, 2 * e
        inside, scale = np.abs(e) <= DELTA, DELTA if case.kind == "smooth_l1" else 1
        loss = np.where(inside, e**2 / 2, DELTA * (np.abs(e) - DELTA / 2))
        return loss / scale, np.clip(e, -DELTA, DELTA) / scale

    free, slope = regression(x - g)
    if old is None:
        return free, slope, never
    held, _ = regression(old + np.clip(x - old, -CLIP, CLIP) - g)
    clipped = held > free
    return np.maximum(free, held), np.where(clipped, 0, slope), clipped


def expected(case: Case) -> dict[str, Tensor]:
    """The definitions, token by token."""
    data = {name: x.double().numpy() if x.is_floating_point() else x.numpy() for name, x in case.data.items()}
    B = len(case.lengths)
    per_row = lambda name: np.broadcast_to(data[name], (B,))  # noqa: E731
    x = data["values"]
    v = 1 / (1 + np.exp(-x)) if case.kind == "bce_logits" else x
    names = ("returns", "advantages", "pair returns", "pair advantages", "dV", "dr", "losses", "loss gradient")
    out = {name: np.zeros(case.shape) for name in names}
    out |= {"map": np.zeros((B, 2)), "dR": np.zeros(B), "scale": np.zeros(B), "statistics": np.zeros(6)}
    sums, counts, derivatives = np.zeros(B), np.zeros(B), np.zeros(case.shape)

    def returns(b: int, row: int, tokens: slice, lam: float, v: np.ndarray, h: float) -> tuple[np.ndarray, float]:
        g, gamma = np.zeros(tokens.stop - tokens.start), per_row("gamma")[b]
        for i in range(len(g) - 1, -1, -1):
            t = tokens.start + i
            if data["valid"][row, t]:
                g[i] = h + (data["rewards"][row, t] if case.rewarded else 0)
                h = gamma * lam * g[i] + (0 if lam == 1 else gamma * (1 - lam) * v[row, t])
        return g, h

    for b, (row, tokens) in enumerate(case.spans()):
        valid, counted = data["valid"][row, tokens], data["counted"][row, tokens]
        gamma, lam, terminal = per_row("gamma")[b], per_row("lam")[b], data["terminal"][b]
        for prefix, lams in (("", (lam, lam)), ("pair ", (per_row("other_lam")[b], lam))):
            out[f"{prefix}returns"][row, tokens], _ = returns(b, row, tokens, lams[0], x, terminal)
            g, _ = returns(b, row, tokens, lams[1], x, terminal)
            out[f"{prefix}advantages"][row, tokens] = np.where(valid, g - x[row, tokens], 0)
        out["map"][b] = (gamma * lam) ** valid.sum(), returns(b, row, tokens, lam, x, 0.0)[1]
        adjoint = 0.0
        for t in range(tokens.start, tokens.stop):
            if data["valid"][row, t]:
                out["dV"][row, t] = gamma * (1 - lam) * adjoint
                adjoint = data["grad"][row, t] + gamma * lam * adjoint
                out["dr"][row, t] = adjoint
        out["dR"][b] = adjoint

        g, _ = returns(b, row, tokens, lam, v, terminal)
        g, inputs = g[counted], x[row, tokens][counted]
        old = data["old"][row, tokens][counted] if case.old else None
        loss, derivative, clipped = token_loss(case, inputs, g, old)
        out["losses"][row, tokens][counted] = loss
        derivatives[row, tokens][counted] = derivative
        sums[b], counts[b], error = loss.sum(), counted.sum(), g - v[row, tokens][counted]
        out["statistics"] += (len(g), g.sum(), (g**2).sum(), error.sum(), (error**2).sum(), clipped.sum())

    def over(divisor: float) -> float:
        return 0 if divisor == 0 else 1 / divisor

    if case.reduction == "token mean":
        out["scale"] += over(counts.sum() if case.normalizer is None else case.normalizer)
    elif case.reduction == "sequence mean":
        sequences = over((counts > 0).sum() if case.normalizer is None else case.normalizer)
        out["scale"] = sequences * np.array([over(count) for count in counts])
    else:
        out["scale"] += 1
    out["loss"] = out["losses"] if case.reduction == "none" else (sums * out["scale"]).sum()
    for b, (row, tokens) in enumerate(case.spans()):
        factor = data["grad_losses"][row, tokens] if case.reduction == "none" else 1.5 * out["scale"][b]
        counted = data["counted"][row, tokens]
        out["loss gradient"][row, tokens] = np.where(counted, factor * derivatives[row, tokens], 0)
    del out["losses"]
    return {name: torch.from_numpy(np.asarray(x, dtype=np.float64)) for name, x in out.items()}


def check(kernels, case: Case) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        exact = expected(case)
    ours = run(kernels, case)
    assert ours.keys() == exact.keys()
    for name, x in ours.items():
        assert x.shape == exact[name].shape, name
        eps = torch.finfo(accumulate_dtype(case.dtype)).eps
        largest = exact[name].abs().max() if x.numel() else torch.tensor(0.0)
        if name == "statistics":  # their terms cancel: no sum errs by more than its count of terms asks for
            largest = exact[name][[0, 2, 4]].max()
        tolerance = torch.finfo(x.dtype).eps * exact[name].abs() + 128 * eps * largest
        if name in ("returns", "advantages", "pair returns", "pair advantages", "dV", "dr", "dR", "map"):
            tolerance = tolerance.clamp(min=128 * eps)
        error = (x.double() - exact[name]).abs()
        assert (error <= tolerance).all(), (name, case, (error - tolerance).max())


# ---- tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_padded_shapes_around_every_tile(kernels, dtype):
    items = 4 if dtype == torch.float64 else 8
    turns = product((True, False), repeat=3)
    for turn, T in enumerate(every_length([items, 32 * items, 64 * items, 256 * items, 512 * items])):
        rewarded, masked, discount_per_row = next(turns, None) or next(turns := product((True, False), repeat=3))
        case = Case(
            (T,) * ((1, 2, 3)[turn % 3] if T < 600 else 1),
            dtype=dtype,
            rewarded=rewarded,
            masked=masked,
            attended=turn % 3 != 0,
            discount_per_row=discount_per_row,
            old=turn % 2 == 0,
            layout=tuple(LAYOUTS)[turn % len(LAYOUTS)],
            reduction=REDUCTIONS[turn % 4],
            lam=(0.95, 1.0, 0.0, 0.99)[turn % 4] if not discount_per_row else 0.97,
            seed=turn,
        )
        check(kernels, case)


PACKED = {
    "nothing": (0, 0, 0),
    "one token": (1,),
    "one tokens": (1,) * 70,
    "short": (5, 0, 17, 1, 0, 300, 8, 0),
    "two warps a row": (*range(37), 700),
    "long": (0, 9001, 1, 0, 5000, 2048, 2047, 2049, 0),
    "very long among empty": (0, 0, 13_000, 0),
    "many rows": (3, 0, 11, 40) * 130,
    "many longer rows": (300, 0, 1, 1500) * 128,
}


@pytest.mark.parametrize("lengths", PACKED)
def test_packed(kernels, lengths):
    for turn, outside in enumerate((0, 3)):
        case = Case(PACKED[lengths], packed=True, outside=outside, old=outside == 0, reduction=REDUCTIONS[turn])
        check(kernels, replace(case, layout="shifted" if turn else "dense"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_packed_dtypes(kernels, dtype):
    for lengths in ("short", "long"):
        check(kernels, Case(PACKED[lengths], packed=True, dtype=dtype, reduction="sequence mean", old=True))
        check(kernels, Case(PACKED[lengths], packed=True, dtype=dtype, reduction="none", masked=False, attended=False))


def test_packed_plans_meant_above(kernels):
    for lengths, name in {
        "short": "warp per row",
        "long": "long rows",
        "very long among empty": "long rows",
        "many rows": "warp per row",
        "many longer rows": "warp per row",
    }.items():
        assert kernels.packed_plan(len(PACKED[lengths]), sum(PACKED[lengths]), 1, 8)[0] == name
    assert kernels.packed_plan(600, 600 * 900, 1, 8)[0] == "block per row"


def test_packed_block_per_row(kernels):
    check(kernels, Case((900, 300, 0, 1600) * 150, packed=True, reduction="sequence mean"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_losses(kernels, kind, reduction):
    shapes = [Case((260,) * 5), Case((5000, 0, 1, 700), packed=True), Case((700,) * 3, dtype=torch.bfloat16)]
    for turn, shape in enumerate(shapes):
        case = replace(shape, kind=kind, reduction=reduction, rewarded=turn == 0, lam=0.9, seed=turn)
        check(kernels, case)
        check(kernels, replace(case, normalizer=7.0, old=not kind.startswith("bce"), dtype=torch.float64))
        check(kernels, replace(case, normalizer=0.0))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_without_tokens(kernels, reduction):
    for case in (Case(()), Case((0, 0)), Case((), packed=True), Case((), packed=True, outside=5)):
        for normalizer in (None, 4.0):
            check(kernels, replace(case, reduction=reduction, normalizer=normalizer, discount_per_row=False))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_long_padded_rows(kernels, dtype):
    assert kernels.plan(2, 9001, 8)[0] == "long rows"
    check(kernels, Case((9001,) * 2, dtype=dtype, old=True, reduction="sequence mean", layout="shifted"))


@pytest.mark.parametrize(
    "case",
    [
        Case((300,) * 9, old=True, reduction="sequence mean"),
        Case((2500,) * 3, dtype=torch.bfloat16, kind="bce_logits"),
        Case(PACKED["long"], packed=True, old=True, reduction="sequence mean"),
        Case((5, 0, 17, 1, 700), packed=True, dtype=torch.float64, kind="huber"),
    ],
)
def test_same_bits_under_every_schedule(kernels, case):
    runs = []
    for resident_blocks in (1, 2, 5, 16):
        for order in ORDERS:
            kernels.use_schedule(order, resident_blocks, resident_blocks)
            runs.append(run(kernels, case))
    for other in runs[1:]:
        for name, output in runs[0].items():
            bits = (x.reshape(-1).contiguous().view(torch.uint8) for x in (output, other[name]))
            assert torch.equal(*bits), name
