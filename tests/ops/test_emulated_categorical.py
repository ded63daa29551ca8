"""The CUDA kernels of the classification loss, run on the CPU by the emulator, against their definition in float64."""

from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from emulated_kernels_testing import EmulatedKernels, build_emulated_kernels, laid_out, to_torch
from ops_testing import VALUE_DTYPES, accumulate_dtype, rng
from torch import Tensor

from lambda_return_ext import reference
from lambda_return_ext.categorical import TARGETS, Bins, categorical_values

REDUCTIONS = ("token_mean", "sequence_mean", "sum", "none")  # in the order of Reduction
BINS = {"hl_gauss": Bins(-0.5, 1.5), "wide": Bins(-1.0, 2.0, "hl_gauss", 6.0), "two_hot": Bins(0.0, 1.0, "two_hot")}
# (offset, gap) of the logits, where the gap is between tokens, and of everything else, where it is between rows.
LAYOUTS = {"dense": ((0, 0), (0, 0)), "shifted": ((3, 0), (5, 2)), "apart": ((0, 5), (1, 3))}
GRAD = 1.5


@pytest.fixture(scope="module")
def kernels():
    kernels = EmulatedKernels(build_emulated_kernels())
    yield kernels
    kernels.close()


@pytest.fixture(autouse=True)
def schedule(kernels):
    kernels.use_schedule("random", 1, 4)


@dataclass(frozen=True)
class Case:
    """Sequences of these lengths, as a padded matrix of equal ones or packed with tokens before and after them."""

    lengths: tuple[int, ...]
    K: int
    packed: bool = False
    outside: int = 0
    dtype: torch.dtype = torch.float32
    bins: str = "hl_gauss"
    optional: bool = True  # masks and rewards
    reduction: str = "token_mean"
    normalizer: float | None = None
    layout: str = "dense"

    @property
    def shape(self) -> tuple[int, int]:
        if self.packed:
            return 1, sum(self.lengths) + 2 * self.outside
        return len(self.lengths), self.lengths[0] if self.lengths else 3

    @cached_property
    def cu_seqlens(self) -> Tensor | None:
        return self.outside + torch.tensor([0, *self.lengths]).cumsum(0) if self.packed else None

    @cached_property
    def inside(self) -> Tensor:
        """The tokens that belong to a sequence."""
        inside = torch.ones(self.shape, dtype=torch.bool)
        if self.packed and self.outside:
            inside[:, : self.outside] = inside[:, -self.outside :] = False
        return inside

    @cached_property
    def data(self) -> dict[str, Tensor]:
        generator, B, acc = rng(len(self.lengths) + self.K), len(self.lengths), accumulate_dtype(self.dtype)

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        valid = draw(*self.shape) < 0.7 if self.optional else self.inside
        attended = draw(*self.shape) < 0.8 if self.optional else torch.ones_like(valid)
        logits = 6 * draw(*self.shape, self.K) - 3
        rewards = draw(*self.shape) / 4 - 0.125
        return {
            "logits": torch.where(valid[..., None], logits, float("nan")).to(self.dtype),
            "valid": valid,
            "attended": attended,
            "counted": valid & attended & self.inside,
            "rewards": torch.where(valid, rewards, float("nan")).to(acc),
            "grad_losses": torch.where(valid & attended, draw(*self.shape), float("nan")).to(acc),
            "terminal": draw(B).to(acc),
            "gamma": 1 - draw(B) / 50,
            "lam": torch.tensor(0.9, dtype=torch.float64),
        }


def run(kernels, case: Case) -> dict[str, Tensor]:
    """Every output of forward and backward."""
    data, (of_logits, of_others) = case.data, LAYOUTS[case.layout]
    bins, how = BINS[case.bins], REDUCTIONS.index(case.reduction)
    options = (TARGETS.index(bins.target), bins.low, bins.high, bins.sigma, how)
    logits = laid_out(data["logits"], *of_logits)
    names = ("valid", "attended", "rewards")
    mask, attended, rewards = (laid_out(data[x], *of_others) if case.optional else None for x in names)
    cu_seqlens = None if case.cu_seqlens is None else case.cu_seqlens.numpy()
    discount = (data["gamma"].numpy(), data["lam"].numpy())
    loss, scale, statistics, returns, log_sums = kernels.categorical_value_loss(
        logits, data["terminal"].numpy(), mask, attended, rewards, cu_seqlens, *discount, case.normalizer, *options
    )
    acc = accumulate_dtype(case.dtype)
    grad = laid_out(data["grad_losses"], *of_others) if loss.ndim else torch.tensor(GRAD, dtype=acc).numpy()
    gradient = kernels.categorical_value_loss_backward(grad, scale, logits, returns, log_sums, cu_seqlens, *options)
    outputs = {"loss": loss, "scale": scale, "statistics": statistics, "returns": returns, "log_sums": log_sums}
    return {name: to_torch(x) for name, x in (outputs | {"gradient": gradient}).items()}


def expected(case: Case) -> dict[str, Tensor]:
    """The definition, by torch and reference.py in float64, of the tokens inside of sequences."""
    data, bins, B = case.data, BINS[case.bins], len(case.lengths)
    inside = case.inside
    where = (lambda x: x[inside]) if case.packed else lambda x: x
    logits, valid, rewards, counts = (where(data[name]) for name in ("logits", "valid", "rewards", "counted"))
    x = torch.where(valid[..., None], logits, 0.0).double().requires_grad_()
    values = categorical_values(x.detach(), bins)
    scan = (valid, data["gamma"], data["lam"])
    options = {"rewards": rewards.double().nan_to_num()} if case.optional else {}
    cu_seqlens = None if case.cu_seqlens is None else case.cu_seqlens - case.outside
    if cu_seqlens is None:
        targets = reference.compute_lambda_return(values, data["terminal"].double(), *scan, **options)
    else:
        targets = reference.lambda_return_varlen(values, data["terminal"].double(), cu_seqlens, *scan, **options)
    losses = -(bins.probabilities(targets, case.K) * x.log_softmax(-1)).sum(-1)
    losses = torch.where(counts, losses, 0.0)
    statistics = reference.token_statistics(values, targets, counts)
    normalizer = None if case.normalizer is None else torch.tensor(case.normalizer, dtype=torch.float64)
    loss = reference.reduce_losses(losses, counts, case.reduction, normalizer, cu_seqlens)
    incoming = where(data["grad_losses"]).double() if case.reduction == "none" else torch.tensor(GRAD).double()
    incoming = torch.where(counts, incoming, 0.0) if case.reduction == "none" else incoming
    (gradient,) = torch.autograd.grad((loss * incoming).sum(), x)
    which = torch.arange(B).repeat_interleave(torch.tensor(case.lengths, dtype=torch.int64)).view(counts.shape)
    tokens = torch.zeros(B, dtype=torch.float64).index_add_(0, which.flatten(), counts.flatten().double())
    divisor = torch.ones(B, dtype=torch.float64)
    if case.reduction == "token_mean":
        divisor *= tokens.sum() if case.normalizer is None else case.normalizer
    elif case.reduction == "sequence_mean":
        divisor = tokens * ((tokens > 0).sum() if case.normalizer is None else case.normalizer)
    scale = torch.where(divisor == 0, 0.0, 1 / divisor)

    def placed(y: Tensor, fill: float = 0.0) -> Tensor:
        if not case.packed:
            return y
        out = torch.full((*case.shape, *y.shape[1:]), fill, dtype=torch.float64)
        out[inside] = y
        return out

    log_sums = torch.where(counts, (x.detach() - x.detach().amax(-1, keepdim=True)).exp().sum(-1).log(), float("inf"))
    return {
        "loss": placed(loss.detach()) if case.reduction == "none" else loss.detach(),
        "scale": scale,
        "statistics": statistics,
        "returns": placed(torch.where(valid, targets, 0.0)),
        "log_sums": placed(log_sums, float("inf")),
        "gradient": placed(torch.where(counts[..., None], gradient, 0.0)),
    }


def check(kernels, case: Case) -> None:
    exact, ours = expected(case), run(kernels, case)
    assert ours.keys() == exact.keys()
    for name, x in ours.items():
        wanted = exact[name]
        assert x.shape == wanted.shape, name
        finite = wanted.isfinite()
        assert torch.equal(x[wanted.isinf()].double(), wanted[wanted.isinf()]), name
        x, wanted = x[finite].double(), wanted[finite]
        if not x.numel():
            continue
        eps = torch.finfo(accumulate_dtype(case.dtype)).eps
        largest = exact[name][[0, 2, 4]].max() if name == "statistics" else wanted.abs().max()
        # The place of a target is a number of up to K; a gradient is rounded to the logits' dtype.
        rounding = torch.finfo(ours[name].dtype).eps * wanted.abs()
        tolerance = rounding + 8 * (16 + case.K) * eps * largest
        assert ((x - wanted).abs() <= tolerance).all(), (name, case, ((x - wanted).abs() - tolerance).max())


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_every_number_of_bins(kernels, dtype):
    """Around the logits of one access, of a group of each size, and of more turns than one."""
    logits = 128 // torch.finfo(dtype).bits
    counts = sorted({2, 3, 11, 51, *(logits * 2**i + step for i in range(6) for step in (-1, 0, 1)), 80 * logits})
    for turn, K in enumerate(k for k in counts if k >= 2):
        case = Case(
            (7,) * 3,
            K,
            dtype=dtype,
            bins=tuple(BINS)[turn % 3],
            layout=tuple(LAYOUTS)[turn // 3 % 3],
            reduction=REDUCTIONS[turn % 4],
        )
        check(kernels, case)


@pytest.mark.parametrize("T", [1, 8, 9, 255, 257, 511, 513, 2049])
def test_padded_rows_around_every_tile(kernels, T):
    for dtype, layout in ((torch.float32, "dense"), (torch.bfloat16, "shifted")):
        check(kernels, Case((T,) * (3 if T < 600 else 1), 5, dtype=dtype, layout=layout, reduction="none"))
        check(kernels, Case((T,) * 2, 3, dtype=dtype, bins="two_hot", optional=T % 2 == 0, reduction="sequence_mean"))


PACKED = {
    "nothing": (0, 0, 0),
    "no sequence": (),
    "one token": (1,),
    "short": (5, 0, 17, 1, 0, 300, 8, 0),
    "long": (0, 4500, 1, 0, 2048, 2047, 0),
}


@pytest.mark.parametrize("lengths", PACKED)
def test_packed(kernels, lengths):
    for turn, outside in enumerate((0, 3)):
        for reduction in REDUCTIONS[turn::2]:
            case = Case(PACKED[lengths], 9, packed=True, outside=outside, reduction=reduction, optional=not outside)
            check(kernels, replace(case, layout="apart" if turn else "dense", bins=tuple(BINS)[turn]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_packed_dtypes(kernels, dtype):
    check(kernels, Case(PACKED["short"], 21, packed=True, dtype=dtype, reduction="sequence_mean"))


@pytest.mark.parametrize("normalizer", [0.0, 7.0])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_normalizer(kernels, reduction, normalizer):
    check(kernels, Case((40,) * 3, 51, reduction=reduction, normalizer=normalizer))


def test_long_padded_rows(kernels):
    assert kernels.plan(2, 5001, 8)[0] == "long rows"
    check(kernels, Case((5001,) * 2, 4, reduction="sequence_mean"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_token(kernels, reduction):
    for case in (Case((), 5), Case((0, 0), 5), Case((), 5, packed=True, outside=3)):
        check(kernels, replace(case, reduction=reduction))


def test_a_nan_that_is_used_is_not_hidden(kernels):
    case = Case((3,), 20, optional=False, reduction="none")
    case.data["logits"][0, 2, 17] = float("nan")
    outputs = run(kernels, case)
    assert outputs["loss"].isnan().all()  # of the last token itself, and of those whose targets lean on it
    assert outputs["gradient"].isnan().all()


def test_a_bin_may_be_ruled_out(kernels):
    case = Case((1,), 20, optional=False, bins="two_hot", reduction="none")
    case.data["logits"][0, 0, :9] = float("-inf")  # the target's two bins are not among them
    case.data["terminal"][0] = 0.9
    outputs = run(kernels, case)
    assert outputs["loss"].isfinite().all()
    assert (outputs["gradient"][..., :9] == 0).all()


@pytest.mark.parametrize(
    "case",
    [
        Case((70,) * 5, 51, reduction="sequence_mean"),
        Case((2100,) * 2, 7, dtype=torch.bfloat16, bins="two_hot", reduction="none"),
        Case(PACKED["long"], 3, packed=True, reduction="sequence_mean"),
    ],
)
def test_same_bits_under_every_schedule(kernels, case):
    runs = []
    for resident_blocks in (1, 2, 5):
        for order in ("ascending", "descending", "random"):
            kernels.use_schedule(order, resident_blocks, resident_blocks)
            runs.append(run(kernels, case))
    for other in runs[1:]:
        for name, output in runs[0].items():
            bits = (x.reshape(-1).contiguous().view(torch.uint8) for x in (output, other[name]))
            assert torch.equal(*bits), name
