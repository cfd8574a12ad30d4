"""Scaling the columns or the rows of a matrix in Triton: one pass. The functions are those of ``reference``.

PyTorch's own product of a 16-bit matrix and an fp32 vector loads one element at a time, because the dtypes differ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastplug.ops.ahead import launched
from fastplug.ops.configs import ACCESS, WARP, config
from fastplug.ops.launch import on_device, power_of_2, stride_unit, unit_stride
from fastplug.ops.library import custom_op
from fastplug.ops.scaling.reference import check


@triton.jit(do_not_specialize=["x_stride", "out_stride", "M", "COLUMN_BLOCKS"])
def _scale_kernel(
    x_ptr,  # [M, N]
    scale_ptr,  # [N], or [M] if BY_ROW
    out_ptr,  # [M, N]; may be x
    x_stride,  # row strides in units of UNIT elements
    out_stride,
    M,
    N,
    factor,
    COLUMN_BLOCKS,
    BY_ROW: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    rows = (program // COLUMN_BLOCKS).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (program % COLUMN_BLOCKS).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < M) & (cols < N)
    x = tl.load(x_ptr + rows * (x_stride * UNIT) + cols, mask=mask).to(tl.float32)
    if BY_ROW:
        scale = tl.load(scale_ptr + rows, mask=rows < M).to(tl.float32)
    else:
        scale = tl.load(scale_ptr + cols, mask=cols < N).to(tl.float32)
    value = x * (scale * factor)
    out_ptr += rows * (out_stride * UNIT) + cols
    if ACCUMULATE:
        value += tl.load(out_ptr, mask=mask).to(tl.float32)
    tl.store(out_ptr, value.to(out_ptr.dtype.element_ty), mask=mask)


def tile(N: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """``(rows, columns)`` of one program of four warps.

    One access of a warp wide and no wider, so that the scales of a tile, in fp32 from the L2 cache, are few beside it.
    """
    elements = 4 * config(device).per_warp(dtype.itemsize)
    block = min(WARP * ACCESS // dtype.itemsize, power_of_2(N))
    return elements // block, block


@custom_op("out")
def scale_matrix(
    x: torch.Tensor | None, scale: torch.Tensor, out: torch.Tensor, by_row: bool, factor: float, accumulate: bool
) -> None:
    """Write (or add) factor · x with scaled rows or columns into ``out``; x is None where it is ``out``.

    A custom op must not be given what it writes a second time.
    """
    if out.numel() == 0:
        return
    x = out if x is None else x
    M, N = x.shape
    unit = stride_unit(x.stride(0), out.stride(0))
    rows, block = tile(N, x.dtype, x.device)
    column_blocks = triton.cdiv(N, block)
    with on_device(x):
        launched(_scale_kernel, (triton.cdiv(M, rows) * column_blocks,))(
            x, scale, out, x.stride(0) // unit, out.stride(0) // unit, M, N, factor, column_blocks,
            BY_ROW=by_row, ACCUMULATE=accumulate, UNIT=unit, ROWS=rows, BLOCK_N=block, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip


def scale_columns(
    x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, factor: float = 1.0, accumulate: bool = False
) -> None:
    """See :func:`fastplug.ops.scaling.reference.scale_columns`."""
    check(x, scale, out, 1)
    scale_matrix(None if x is out else unit_stride(x), unit_stride(scale), out, False, factor, accumulate)


def scale_rows(x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """See :func:`fastplug.ops.scaling.reference.scale_rows`."""
    check(x, scale, out, 0)
    scale_matrix(None if x is out else unit_stride(x), unit_stride(scale), out, True, 1.0, False)
