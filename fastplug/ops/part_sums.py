"""Adding up what the programs of a launch have written apart, in a fixed order: the same bits each time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_of_parts(parts, place, inside, first, end, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of [parts, stride] over those from ``first`` to ``end``, at ``place`` [BLOCK], in fp32."""
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    row = first  # a while loop: Triton 3.6 cannot interpret a range over tensors with numpy 2.4
    while row < end:
        rows = row + tl.arange(0, ROWS)[:, None]
        total += tl.load(parts + rows * stride + place[None, :], mask=(rows < end) & inside[None, :], other=0.0)
        row += ROWS
    return tl.sum(total, axis=0)


@triton.jit
def store_rounded(out, scaled_out, scale, row, offset, mask, value):
    """``value`` rounded to ``out``, and that times the row's ``scale`` (fp32) to ``scaled_out``, unless it is None."""
    rounded = value.to(out.dtype.element_ty)
    tl.store(out + offset, rounded, mask=mask)
    if scaled_out is not None:
        factor = tl.load(scale + row, mask=mask, other=0.0).to(tl.float32)
        tl.store(scaled_out + offset, (rounded.to(tl.float32) * factor).to(out.dtype.element_ty), mask=mask)


__all__ = ["store_rounded", "sum_of_parts"]
