"""A and B of several adapters in one launch: for q, k and v of a layer they are eight copies and a memset without it.

The functions are those of ``reference``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

import torch
import triton
import triton.language as tl

from fastplug.ops.adapter_matrices import reference
from fastplug.ops.ahead import launched
from fastplug.ops.launch import on_device
from fastplug.ops.library import custom_op

MOST = 3  # adapters of a launch: those of q, k and v
BLOCK, WARPS = 2048, 4
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
T = TypeVar("T")


@triton.jit
def _a_share(value, source, offset, start, end):
    """What of the stacked A comes from one of them, whose numbers are those from ``start`` to ``end``."""
    mine = (offset >= start) & (offset < end)
    return tl.where(mine, tl.load(source + (offset - start), mask=mine, other=0.0).to(value.dtype), value)


@triton.jit
def _b_share(value, source, row, column, start, rows, first, end):
    """What of the block-diagonal B comes from one, ``rows`` from ``start`` on, columns from ``first`` to ``end``."""
    mine = (row >= start) & (row < start + rows) & (column >= first) & (column < end)
    place = (row - start) * (end - first) + (column - first)
    return tl.where(mine, tl.load(source + place, mask=mine, other=0.0).to(value.dtype), value)


@triton.jit(
    do_not_specialize=[
        "width", "out_features", "end0", "end1", "end2", "row0", "row1", "row2", "rows0", "rows1", "rows2", "programs"
    ]
)  # fmt: skip
def _adapters_kernel(
    a0,  # [its rank, width], contiguous
    a1,
    a2,
    b0,  # [its rows, its rank], contiguous
    b1,
    b2,
    stacked,  # [rank, width]
    block,  # [out_features, rank]
    width,
    out_features,
    end0,  # where the rank of each ends
    end1,
    end2,
    row0,  # where the rows of each B begin, and how many they are
    row1,
    row2,
    rows0,
    rows1,
    rows2,
    programs,  # that work on the stacked A; the others on B
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if program < programs:
        offset = program * BLOCK + tl.arange(0, BLOCK)
        value = tl.zeros((BLOCK,), dtype=stacked.dtype.element_ty)
        value = _a_share(value, a0, offset, 0, end0 * width)
        if COUNT > 1:
            value = _a_share(value, a1, offset, end0 * width, end1 * width)
        if COUNT > 2:
            value = _a_share(value, a2, offset, end1 * width, end2 * width)
        tl.store(stacked + offset, value, mask=offset < end2 * width)
    else:
        offset = (program - programs) * BLOCK + tl.arange(0, BLOCK)
        row = offset // end2
        column = offset - row * end2
        value = tl.zeros((BLOCK,), dtype=block.dtype.element_ty)
        value = _b_share(value, b0, row, column, row0, rows0, 0, end0)
        if COUNT > 1:
            value = _b_share(value, b1, row, column, row1, rows1, end0, end1)
        if COUNT > 2:
            value = _b_share(value, b2, row, column, row2, rows2, end1, end2)
        tl.store(block + offset, value, mask=offset < out_features * end2)


@custom_op("stacked", "block")
def adapter_matrices(
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    rows: Sequence[int],
    stacked: torch.Tensor,
    block: torch.Tensor,
) -> None:
    """See :func:`fastplug.ops.adapter_matrices.reference.matrices`; the results go into ``stacked`` and ``block``."""
    ends = [*itertools.accumulate(map(len, a))]
    programs = triton.cdiv(stacked.numel(), BLOCK)
    with on_device(stacked):
        launched(_adapters_kernel, (programs + triton.cdiv(block.numel(), BLOCK),))(
            *_filled(a), *_filled(b), stacked, block, stacked.shape[1], len(block), *_filled(ends), *_filled(rows),
            *_filled([*map(len, b)]), programs, COUNT=len(a), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


def _filled(given: Sequence[T]) -> list[T]:
    """As many as the kernel takes; what is beyond COUNT is not read, but for the last end."""
    return [*given, *[given[-1]] * (MOST - len(given))]


def matrices(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], rows: Sequence[int], out_features: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`fastplug.ops.adapter_matrices.reference.matrices`."""
    rank, width = sum(map(len, a)), a[0].shape[1]
    if not rank or not _suits(a, b, out_features, dtype) or rank * max(out_features, width) >= 2**31 - BLOCK:
        return reference.matrices(a, b, rows, out_features, dtype)
    stacked = torch.empty(rank, width, dtype=dtype, device=a[0].device)
    block = torch.empty(out_features, rank, dtype=dtype, device=a[0].device)
    adapter_matrices(a, b, rows, stacked, block)
    return stacked, block


def _suits(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], out_features: int, dtype: torch.dtype) -> bool:
    """Whether the kernel reads and writes such tensors, and there is anything to do for it."""
    if len(b[0]) == out_features and a[0].dtype == b[0].dtype == dtype:
        return False  # they are the results themselves
    return len(a) <= MOST and dtype in _DTYPES and all(map(_plain, (*a, *b)))


def _plain(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor and tensor.is_contiguous() and tensor.dtype in _DTYPES
