"""Matrices as the copy engine of Hopper GPUs reads and writes them: imported by kernels in Gluon only."""

from __future__ import annotations

import functools
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

GLUON = {torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def matrix(tensor: torch.Tensor, rows: int, columns: int) -> Any:
    """The matrix in tiles of ``rows`` x ``columns``."""
    return TensorDescriptor(
        tensor, list(tensor.shape), list(tensor.stride()), [rows, columns], _layout(rows, columns, tensor.dtype)
    )


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """Of a tile in shared memory. To make one takes longer than the rest of a launch."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], GLUON[dtype])
