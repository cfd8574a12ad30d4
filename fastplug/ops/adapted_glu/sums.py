"""What programs of the adapted gated unit's kernels have summed up apart, added up: one launch each way, in Triton.

The results come out as they are wanted next: scaled and rounded, times 1/rms for the gradients of A, A's gradient with
A's layout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastplug.ops.adapted_glu.sizes import TILE, Stretches
from fastplug.ops.ahead import launched
from fastplug.ops.launch import on_device
from fastplug.ops.part_sums import store_rounded, sum_of_parts

BLOCK, ROWS = 512, 16  # numbers of a program, and parts that it reads at a time
WARPS = 4


@triton.jit
def _count(line, length, units, programs):
    """How many programs work on a line of ``length`` units; all ``units`` are cut into stretches of equal length."""
    start = tl.cast(line, tl.int64) * length
    return ((start + length) * programs - 1) // units - ((start + 1) * programs - 1) // units + 1


@triton.jit(do_not_specialize=["tokens", "rank", "length", "units", "programs", "scaling"])
def _rows_kernel(
    parts,  # [slots, tokens, R] fp32
    out,  # [tokens, rank]
    tokens,
    rank,
    length,
    units,
    programs,
    scaling,
    R: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    place, stride = start + tl.arange(0, BLOCK), tokens.to(tl.int64) * R
    end = _count(start // (TILE * R), length, units, programs)
    total = sum_of_parts(parts, place, place < stride, end * 0, end, stride, ROWS, BLOCK) * scaling
    column = place % R
    tl.store(out + place // R * rank + column, total.to(out.dtype.element_ty), mask=(place < stride) & (column < rank))


def of_rows(parts: torch.Tensor, stretches: Stretches, scaling: float, out: torch.Tensor) -> None:
    """scaling times the sum of ``parts`` [slots, tokens, R] into ``out`` [tokens, rank]: of each tile's tokens those
    that its programs wrote."""
    _, tokens, R = parts.shape
    with on_device(out):
        launched(_rows_kernel, (triton.cdiv(tokens * R, BLOCK),))(
            parts, out, tokens, out.shape[1], *stretches, scaling, R=R, TILE=TILE, ROWS=ROWS, BLOCK=BLOCK,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit
def _add_up_gb(
    program, parts, gb, normed, rstd, tokens, columns, rank, gate_end, up, gate_scaling, up_scaling,
    JOINT: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of [tokens, 2 R]."""
    start, stride = program.to(tl.int64) * BLOCK, tokens.to(tl.int64) * (2 * R)
    place = start + tl.arange(0, BLOCK)
    first = stride * 0
    total = sum_of_parts(parts, place, place < stride, first, first + columns, stride, ROWS, BLOCK)
    if JOINT:
        both = tl.sum(tl.reshape(total, (BLOCK // (2 * R), 2, R)), axis=1) * gate_scaling
        row = start // (2 * R) + tl.arange(0, BLOCK // (2 * R))[:, None]
        column = tl.arange(0, R)[None, :]
        mask = (row < tokens) & (column < gate_end)
        store_rounded(gb, normed, rstd, row, row * rank + column, mask, both)
    else:
        token, is_up = place // (2 * R), place // R % 2 == 1
        its = place % R + tl.where(is_up, up, 0)
        inside = (place < stride) & (its < tl.where(is_up, rank, gate_end))
        scaled = total * tl.where(is_up, up_scaling, gate_scaling)
        store_rounded(gb, normed, rstd, token, token * rank + its, inside, scaled)


@triton.jit
def _add_up_matrices(
    program, parts, of_b, of_a, width, down_rank, length, units, programs,
    ADD: tl.constexpr, R: tl.constexpr, SUB: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One block of channels of one of the three."""
    blocks = tl.cdiv(width, TILE)
    which, block = program // blocks, program % blocks
    channel = (block * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    column = tl.arange(0, R)[None, :]
    matrix = width.to(tl.int64) * R
    here = which * matrix + channel * R + column
    end = _count(block // SUB, length, units, programs)
    total = tl.zeros((TILE, R), tl.float32)
    slot = end * 0
    while slot < end:
        total += tl.load(parts + slot * (3 * matrix) + here, mask=channel < width, other=0.0)
        slot += 1
    if which < 2:
        _put(of_b + here, total, channel < width, ADD)
    else:
        _put(of_a + column * width.to(tl.int64) + channel, total, (channel < width) & (column < down_rank), ADD)


@triton.jit
def _put(out, value, mask, ADD: tl.constexpr):
    if ADD:
        tl.store(out, value + tl.load(out, mask=mask, other=0.0), mask=mask)
    else:
        tl.store(out, value, mask=mask)


@triton.jit(
    do_not_specialize=[
        "tokens", "width", "columns", "rank", "gate_end", "up", "down_rank", "gate_scaling", "up_scaling", "length",
        "units", "programs", "of_gb",
    ]
)  # fmt: skip
def _columns_kernel(
    gb_parts,  # [columns, tokens, 2 R]
    ab_parts,  # [slots, 3, width, R] fp32
    gb,  # [tokens, rank]
    normed,  # likewise, or None
    rstd,  # [tokens]
    of_b,  # [2, width, R] fp32
    of_a,  # [down_rank, width] fp32
    tokens,
    width,
    columns,
    rank,
    gate_end,  # where gate's columns of gb end, and up's begin
    up,
    down_rank,
    gate_scaling,
    up_scaling,
    length,
    units,
    programs,
    of_gb,  # programs that add up gb; the others add up matrices
    JOINT: tl.constexpr,  # gate and up have the same columns
    ADD: tl.constexpr,  # to what of_b and of_a hold
    R: tl.constexpr,
    SUB: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if program < of_gb:
        _add_up_gb(
            program, gb_parts, gb, normed, rstd, tokens, columns, rank, gate_end, up, gate_scaling, up_scaling,
            JOINT, R, ROWS, BLOCK,
        )  # fmt: skip
    else:
        _add_up_matrices(
            program - of_gb, ab_parts, of_b, of_a, width, down_rank, length, units, programs, ADD, R, SUB, TILE
        )


class Columns(NamedTuple):
    """What is added up over the columns of the backward.

    Attributes:
        gb: The gradient of s · x Aᵀ of gate and up, times s [tokens, rank].
        normed: That times 1/rms, or None.
        rstd: 1/rms [tokens], or None.
        b: The gradients of B of gate and up, [2, width, R] fp32.
        a: That of A of down, [its rank, width] fp32.
    """

    gb: torch.Tensor
    normed: torch.Tensor | None
    rstd: torch.Tensor | None
    b: torch.Tensor
    a: torch.Tensor


def of_columns(
    gb_parts: torch.Tensor,
    ab_parts: torch.Tensor,
    stretches: Stretches,
    sub: int,
    columns: tuple[slice, slice],
    scalings: tuple[float, float],
    out: Columns,
    add: bool,
) -> None:
    """Add up into ``out``.

    Args:
        gb_parts: [columns, tokens, 2 R]: of each column what it adds, of gate's adapter and of up's.
        ab_parts: [slots, 3, width, R] fp32: what programs add to gradients of B of gate, of up, and of A of down.
        stretches: Which programs work on a column.
        sub: Tiles of channels in a column.
        columns: Those of gate and of up in ``out.gb``.
        scalings: The factors s of gate and of up.
        out: See :class:`Columns`.
        add: Whether ``out.b`` and ``out.a`` hold something to be added to.
    """
    (count, tokens, twice), width, (gate, up) = gb_parts.shape, ab_parts.shape[2], columns
    of_gb = triton.cdiv(tokens * twice, BLOCK)
    with on_device(out.gb):
        launched(_columns_kernel, (of_gb + 3 * triton.cdiv(width, TILE),))(
            gb_parts, ab_parts, out.gb, out.normed, out.rstd, out.b, out.a, tokens, width, count, out.gb.shape[1],
            gate.stop, up.start, len(out.a), *scalings, *stretches, of_gb, JOINT=gate == up, ADD=add, R=twice // 2,
            SUB=sub, TILE=TILE, ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip


__all__ = ["Columns", "of_columns", "of_rows"]
