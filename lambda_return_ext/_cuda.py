"""Loads the CUDA kernels, or makes every operator say on a CUDA tensor why they are not there.

The kernels live in a library of their own, one for each CUDA major version, so that one wheel serves a CPU torch and a
CUDA torch. Loading it registers kernels and does not initialise CUDA.
"""

from pathlib import Path
from typing import NoReturn

import torch

_OPERATORS = (
    "lambda_return",
    "lambda_return_backward",
    "lambda_value_loss",
    "lambda_value_loss_backward",
    "masked_mse",
    "masked_mse_backward",
    "eos_mask",
    "td_lambda",
    "td_lambda_backward",
    "td_lambda_pair",
    "td_lambda_map",
    "td_lambda_loss",
    "td_lambda_loss_backward",
    "categorical_value_loss",
    "categorical_value_loss_backward",
)
available = False  # whether load() found kernels for this torch
_stubs = torch.library.Library("lambda_return", "IMPL")


def _missing(*_arguments: object, **_keywords: object) -> NoReturn:
    raise RuntimeError(
        f"lambda_return_ext has no CUDA kernels for this torch (CUDA {torch.version.cuda}): install it again with nvcc "
        "of that version on the PATH, by `FORCE_CUDA=1 pip install --no-build-isolation .` in its source folder, or "
        "move the tensors to the CPU."
    )


def load() -> None:
    """Load the kernels for the CUDA version of this torch, if there are any."""
    global available
    if torch.version.cuda is not None:
        major = torch.version.cuda.split(".")[0]
        for library in Path(__file__).parent.glob(f"_C_cuda{major}.*"):
            torch.ops.load_library(library)
            available = True
            return
    for name in _OPERATORS:
        _stubs.impl(name, _missing, "CUDA")
