"""Column by column dot products in Triton: each program sums a stretch of rows of some columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastplug.ops.ahead import launched
from fastplug.ops.column_dots import reference
from fastplug.ops.launch import on_device, persistent_programs, unit_stride
from fastplug.ops.library import custom_op

COLUMNS = 256
ROWS = 16


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def _column_dots_kernel(
    x_ptr,  # [rows, columns]
    y_ptr,  # [rows, columns]
    out_ptr,  # [programs over rows, columns] fp32
    x_stride,
    y_stride,
    rows,
    columns,
    rows_per_program,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    first = tl.program_id(1).to(tl.int64) * rows_per_program
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, rows_per_program, ROWS):
        offset = start + tl.arange(0, ROWS)
        row = first + offset
        mask = ((offset < rows_per_program) & (row < rows))[:, None] & inside[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row[:, None] * y_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        total += x * y
    target = out_ptr + tl.program_id(1).to(tl.int64) * columns + column
    tl.store(target, tl.sum(total, axis=0), mask=inside)


@custom_op("out")
def column_dots_partial(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    """Write the sums of len(out) stretches of rows into ``out``."""
    rows, columns = x.shape
    with on_device(x):
        launched(_column_dots_kernel, (triton.cdiv(columns, COLUMNS), len(out)))(
            x, y, out, x.stride(0), y.stride(0), rows, columns, triton.cdiv(rows, len(out)), ROWS, COLUMNS,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def column_dots(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """See :func:`fastplug.ops.column_dots.reference.column_dots`."""
    reference.check(x, y)
    if x.dtype == torch.float64 or not x.numel():
        return reference.column_dots(x, y)
    x, y = unit_stride(x), unit_stride(y)
    wanted = persistent_programs(x.device, triton.cdiv(len(x), 4 * ROWS) * triton.cdiv(x.shape[1], COLUMNS))
    programs = max(1, wanted // triton.cdiv(x.shape[1], COLUMNS))
    out = torch.empty(programs, x.shape[1], dtype=torch.float32, device=x.device)
    column_dots_partial(x, y, out)
    return out.sum(0)
