"""y + alpha · x bᵀ in Triton, in y or elsewhere, near the speed of reading and writing y.

cuBLAS's product for 32 columns takes 0.50 ms to add to 8192 x 28672 numbers on an H100, copying them 0.31 ms.
The functions are those of ``reference``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastplug.ops.ahead import launched
from fastplug.ops.launch import check_output, on_device, power_of_2, stride_unit, unit_stride
from fastplug.ops.library import custom_op

LARGEST_RANK = 128  # of which tiles of x and b fit into the shared memory of all GPUs
ROWS, COLUMNS, WARPS = 64, 128, 8


@triton.jit(do_not_specialize=["M", "COLUMN_BLOCKS"])
def _add_kernel(
    out_ptr,  # [M, N]
    y_ptr,  # [M, N], may be out
    x_ptr,  # [M, R]
    b_ptr,  # [N, R]
    out_stride,  # between rows, in units of UNIT elements
    y_stride,
    x_stride,
    x_rank_stride,
    b_stride,
    b_rank_stride,
    M,
    N,
    R,
    alpha,
    COLUMN_BLOCKS,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    program = tl.program_id(0)
    rows = (program // COLUMN_BLOCKS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (program % COLUMN_BLOCKS).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANK).to(tl.int64)
    x_mask = (rows < M)[:, None] & (rank < R)[None, :]
    b_mask = (rank < R)[:, None] & (cols < N)[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    y = tl.load(y_ptr + rows[:, None] * (y_stride * UNIT) + cols[None, :], mask=mask, other=0.0)
    x = tl.load(x_ptr + rows[:, None] * x_stride + rank[None, :] * x_rank_stride, mask=x_mask, other=0.0)
    b = tl.load(b_ptr + cols[None, :] * b_stride + rank[:, None] * b_rank_stride, mask=b_mask, other=0.0)
    share = tl.dot(x, b, input_precision="ieee") * alpha
    out_ptr += rows[:, None] * (out_stride * UNIT) + cols[None, :]
    tl.store(out_ptr, (y.to(tl.float32) + share).to(out_ptr.dtype.element_ty), mask=mask)


@custom_op("y")
def low_rank_add(y: torch.Tensor, x: torch.Tensor, b: torch.Tensor, alpha: float) -> None:
    """See :func:`fastplug.ops.low_rank.reference.add`; the last dimension of ``y`` is contiguous."""
    _launch(y, y, x, b, alpha)


@custom_op("out")
def low_rank_added(y: torch.Tensor, x: torch.Tensor, b: torch.Tensor, alpha: float, out: torch.Tensor) -> None:
    """y + alpha · x bᵀ into ``out``; the last dimensions of both are contiguous."""
    _launch(out, y, x, b, alpha)


def _launch(out: torch.Tensor, y: torch.Tensor, x: torch.Tensor, b: torch.Tensor, alpha: float) -> None:
    M, N = y.shape
    if y.numel() == 0 or (x.shape[1] == 0 and out is y):
        return
    unit = stride_unit(y.stride(0), out.stride(0))
    column_blocks = triton.cdiv(N, COLUMNS)
    with on_device(y):
        launched(_add_kernel, (triton.cdiv(M, ROWS) * column_blocks,))(
            out, y, x, b, out.stride(0) // unit, y.stride(0) // unit, *x.stride(), *b.stride(), M, N, x.shape[1],
            alpha, column_blocks, UNIT=unit, ROWS=ROWS, COLUMNS=COLUMNS, RANK=max(16, power_of_2(x.shape[1])),
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def _fits(y: torch.Tensor) -> bool:
    """Whether the tiles fit into registers: with tensor cores that take the dtype (from sm_80 on), in 16 bits."""
    if not y.is_cuda:
        return y.dtype != torch.float64  # the interpreter
    return y.dtype.itemsize == 2 and (
        torch.version.hip is not None or torch.cuda.get_device_capability(y.device) >= (8, 0)
    )


def add(y: torch.Tensor, x: torch.Tensor, b: torch.Tensor, alpha: float = 1.0) -> None:
    """See :func:`fastplug.ops.low_rank.reference.add`."""
    if x.shape[1] > LARGEST_RANK or not _fits(y):
        y.addmm_(x, b.t(), alpha=alpha)
        return
    check_output("y", y, (x.shape[0], b.shape[0]))
    low_rank_add(y, x, b, alpha)


def added(y: torch.Tensor, x: torch.Tensor, b: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """See :func:`fastplug.ops.low_rank.reference.added`."""
    if x.shape[1] > LARGEST_RANK or not _fits(y):
        return torch.addmm(y, x, b.t(), alpha=alpha)
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    low_rank_added(unit_stride(y), x, b, alpha, out)
    return out
