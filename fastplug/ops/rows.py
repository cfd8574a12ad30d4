"""Copying between tensors whose rows lie apart."""

from __future__ import annotations

import torch

_WIDE = torch.int64


def copy_rows(out: torch.Tensor, x: torch.Tensor) -> None:
    """``out.copy_(x)``, for tensors of one shape whose last dimensions are contiguous.

    Where rows lie apart PyTorch moves one element a thread and instruction, which takes 24 us for 8,192 rows of 1,024
    16-bit numbers on an H200. Numbers of 8 bytes are moved like that, where the layout allows.
    """
    if not torch.compiler.is_compiling() and out.dtype == x.dtype and _divides(out) and _divides(x):
        out, x = out.view(_WIDE), x.view(_WIDE)
    out.copy_(x)


def _divides(tensor: torch.Tensor) -> bool:
    """Whether its rows are made of numbers of 8 bytes."""
    count, rest = divmod(_WIDE.itemsize, tensor.itemsize)
    *strides, last = tensor.stride()
    return (
        not rest
        and last == 1
        and tensor.data_ptr() % _WIDE.itemsize == 0
        and not any(n % count for n in (tensor.shape[-1], tensor.storage_offset(), *strides))
    )
