"""Masked reverse lambda-returns and their fused masked value loss for PyTorch.

Importing the package loads the operator library and registers ``torch.ops.lambda_return.*``. The functions below are
the same operators with validated arguments; :mod:`lambda_return_ext.reference` holds their slow plain-torch oracle.
"""

__version__ = "0.1.0"

try:
    from torch import __version__ as _torch_version
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        f"lambda_return_ext {__version__} needs torch >= 2.10, found none: install torch, for example with "
        "`pip install torch`."
    ) from None
if tuple(int(part) for part in _torch_version.split(".")[:2]) < (2, 10):
    raise ImportError(
        f"lambda_return_ext {__version__} needs torch >= 2.10, found {_torch_version}: upgrade torch, for example "
        "with `pip install --upgrade torch`."
    )
try:
    from . import _C  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        f"lambda_return_ext {__version__} could not load its compiled operators ({error}): reinstall it next to the "
        "torch you use, with `pip install --no-build-isolation .` in its source folder."
    ) from error

from . import _cuda, _registrations  # noqa: F401  (importing the second registers fake and autograd)
from .functional import (
    compute_lambda_return,
    compute_lambda_value_loss,
    compute_mc_value_loss,
    compute_pairwise_accuracy,
    compute_token_variance,
    create_eos_only_mask,
    explained_variance,
    gae,
    init_value_head_bias,
    lambda_return_varlen,
    lambda_value_loss_varlen,
    masked_mse,
    masked_whiten,
    pairwise_ranking_loss,
    returns_and_advantages,
)
from .modules import LambdaReturn, LambdaValueLoss

_cuda.load()


def build_info() -> dict[str, str | bool]:
    """What runs the operators here.

    Returns:
        ``version`` of this package, ``torch`` version, ``instruction_set`` of the CPU kernels (``avx512``, ``avx2`` or
        ``portable``: the widest of the processor, or the one that the environment variable ``LAMBDA_RETURN_ISA`` names)
        and whether there are ``cuda_kernels`` for this torch.

    Raises:
        RuntimeError: ``LAMBDA_RETURN_ISA`` names an instruction set that this processor does not have.
    """
    return {
        "version": __version__,
        "torch": str(_torch_version),
        "instruction_set": _C.instruction_set(),
        "cuda_kernels": _cuda.available,
    }


__all__ = [
    "LambdaReturn",
    "LambdaValueLoss",
    "__version__",
    "build_info",
    "compute_lambda_return",
    "compute_lambda_value_loss",
    "compute_mc_value_loss",
    "compute_pairwise_accuracy",
    "compute_token_variance",
    "create_eos_only_mask",
    "explained_variance",
    "gae",
    "init_value_head_bias",
    "lambda_return_varlen",
    "lambda_value_loss_varlen",
    "masked_mse",
    "masked_whiten",
    "pairwise_ranking_loss",
    "returns_and_advantages",
]
