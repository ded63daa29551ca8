"""The CUDA kernels under the emulator, called in a process of their own: a fault that it reports ends that process."""

import importlib
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from native_build import native_build, why_no_emulated_kernels
from torch import Tensor


def build_emulated_kernels() -> Path:
    """Build the Python module and return its folder; skip where a machine lacks what it takes."""
    if missing := why_no_emulated_kernels():
        pytest.skip(missing)
    native_build().build("emulated_kernels")
    return native_build().folder


# ---- arrays ------------------------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """A [B, T] matrix, or [B, T, K], inside a flat array: pickling keeps where its rows start, an array's does not."""

    memory: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements

    def array(self) -> np.ndarray:
        strides = [stride * self.memory.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(self.memory[self.offset :], self.shape, strides)

    def aligned(self) -> "Matrix":
        """Return it in memory that begins as torch's does, which where 16-byte accesses begin depends on."""
        memory = np.empty(self.memory.nbytes + 64, dtype=np.uint8)
        memory = memory[-memory.ctypes.data % 64 :][: self.memory.nbytes].view(self.memory.dtype)
        memory[:] = self.memory
        return self._replace(memory=memory)


def to_numpy(x: Tensor) -> np.ndarray:
    """Return x as an array; bfloat16 as its bits, masks as bytes."""
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.uint16).numpy()
    return x.contiguous().view(torch.uint8).numpy() if x.dtype == torch.bool else x.numpy()


def to_torch(x: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(x)
    return tensor.view(torch.bfloat16) if x.dtype == np.uint16 else tensor


def laid_out(x: Tensor, offset: int = 0, gap: int = 0) -> Matrix:
    """Return x [B, T] with its first row `offset` elements after an aligned address and `gap` elements between rows.

    Around the rows are NaN, or valid tokens. Of [B, T, K], the gaps are between tokens.
    """
    *rows, length = x.shape
    memory = np.full(offset + math.prod(rows) * (length + gap) + 1, 0xFF, dtype=np.uint8).repeat(x.element_size())
    strides = [length + gap, 1]
    strides = strides if len(rows) == 1 else [rows[1] * strides[0], *strides]
    matrix = Matrix(memory.view(to_numpy(x).dtype), offset, tuple(x.shape), tuple(strides))
    matrix.array()[:] = to_numpy(x)
    return matrix


# ---- the process -------------------------------------------------------------------------------------------------


def _call(folder: str, name: str, arguments: tuple[Any, ...]) -> Any:
    if folder not in sys.path:
        sys.path.insert(0, folder)
    attribute = getattr(importlib.import_module("emulated_kernels"), name)
    if not callable(attribute):
        return attribute
    return attribute(*(x.aligned().array() if isinstance(x, Matrix) else x for x in arguments))


class EmulatedKernels:
    """The functions and constants of the module, each called in the other process."""

    def __init__(self, folder: Path):
        self._folder = str(folder)
        self._pool = self._new_pool()

    @staticmethod
    def _new_pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))

    def call(self, name: str, *arguments: Any) -> Any:
        try:
            return self._pool.submit(_call, self._folder, name, arguments).result()
        except BrokenProcessPool:
            self._pool = self._new_pool()
            pytest.fail(f"{name}: the emulator found a fault, and says which in the captured output")

    def __getattr__(self, name: str) -> Any:
        return partial(self.call, name)

    def constant(self, name: str) -> int:
        return self.call(name)

    def close(self) -> None:
        self._pool.shutdown()
