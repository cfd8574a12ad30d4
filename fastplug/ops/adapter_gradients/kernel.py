"""g B and gᵀ x Aᵀ in one pass over g, in Triton: a launch for both products, and one that adds their parts up.

A program takes a strip of an adapter's channels through a number of tokens. What the strip's channels add to a token's
g B is written for each strip, what its tokens add to the gradient of B for each program; both are small beside g, and
still in the cache when the second launch reads them. It adds in a fixed order: the same bits each time.

The functions are those of ``reference``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastplug.ops.adapter_gradients.reference import Places
from fastplug.ops.ahead import launched
from fastplug.ops.launch import on_device, power_of_2, stride_unit
from fastplug.ops.part_sums import store_rounded, sum_of_parts

MOST = 3  # adapters of a launch: those of q, k and v
LARGEST_RANK = 32  # of one of them; the parts of larger ones are as large as g
WIDEST = 8192  # channels; those of wider tensors do not stay in the cache
FEWEST = 4096  # tokens: fewer make too few programs
ARCHITECTURE = 9  # Hopper: for others Triton's compiler does not fetch tiles of g ahead, as two products read them
TOKENS, CHANNELS, BLOCKS = 32, 256, 16  # of a tile, and tiles of a program
WARPS, STAGES = 4, 4
SUM_BLOCK, SUM_ROWS = 512, 16


@triton.jit
def _of(which, first, second, third):
    return tl.where(which == 0, first, tl.where(which == 1, second, third))


@triton.jit(
    do_not_specialize=[
        "g_stride", "tokens", "channels", "rank", "strips", "strip1", "strip2", "row1", "row2", "column1", "column2",
    ]
)  # fmt: skip
def _products_kernel(
    g_ptr,  # [tokens, channels]
    xa_ptr,  # [tokens, rank]
    b_ptr,  # [channels, rank]
    gb_parts,  # [strips, tokens, R] fp32
    b_parts,  # [programs of a strip, channels, R] fp32
    g_stride,  # between rows; this, channels and rows are in units of UNIT, the rank and columns in units of RANK_UNIT
    tokens,
    channels,
    rank,
    strips,
    strip1,  # the first strip, channel and column of the second adapter and of the third
    strip2,
    row1,
    row2,
    column1,
    column2,
    UNIT: tl.constexpr,
    RANK_UNIT: tl.constexpr,
    R: tl.constexpr,  # as wide as the widest adapter, at least 16
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    channels *= UNIT
    rank *= RANK_UNIT
    strip = tl.program_id(0) % strips
    part = (tl.program_id(0) // strips).to(tl.int64)
    which = (strip >= strip1).to(tl.int32) + (strip >= strip2).to(tl.int32)
    start = _of(which, 0, row1, row2) * UNIT
    channel = start + (strip - _of(which, 0, strip1, strip2)) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < tl.where(which == 2, channels, tl.where(which == 0, row1, row2) * UNIT)
    column = _of(which, 0, column1, column2) * RANK_UNIT + tl.arange(0, R)
    mine = column < tl.where(which == 2, rank, tl.where(which == 0, column1, column2) * RANK_UNIT)
    b_offsets = channel.to(tl.int64)[:, None] * rank + column[None, :]
    b = tl.load(b_ptr + b_offsets, mask=inside[:, None] & mine[None, :], other=0.0)
    of_b = tl.zeros((CHANNELS, R), tl.float32)
    gb_parts += strip.to(tl.int64) * tokens * R
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        token = (part * BLOCKS + block) * TOKENS + tl.arange(0, TOKENS)
        there = token < tokens
        g_offsets = token[:, None] * (g_stride * UNIT) + channel[None, :]
        g = tl.load(g_ptr + g_offsets, mask=there[:, None] & inside[None, :], other=0.0)
        xa_offsets = token[:, None] * rank + column[None, :]
        xa = tl.load(xa_ptr + xa_offsets, mask=there[:, None] & mine[None, :], other=0.0)
        gb = tl.dot(g, b, input_precision="ieee")
        tl.store(gb_parts + token[:, None] * R + tl.arange(0, R)[None, :], gb, mask=there[:, None])
        of_b = tl.dot(tl.trans(g), xa, of_b, input_precision="ieee")
    b_parts += part * channels * R
    tl.store(b_parts + channel.to(tl.int64)[:, None] * R + tl.arange(0, R)[None, :], of_b, mask=inside[:, None])


@triton.jit(
    do_not_specialize=[
        "tokens", "channels", "rank", "strips", "programs", "strip1", "strip2", "column1", "column2", "scaling0",
        "scaling1", "scaling2", "of_gb",
    ]
)  # fmt: skip
def _sum_kernel(
    gb_parts,  # as above
    b_parts,
    gb_ptr,  # [tokens, rank]
    normed_ptr,  # likewise, or None
    rstd_ptr,  # [tokens]
    of_b_ptr,  # [channels, R] fp32
    tokens,
    channels,
    rank,
    strips,
    programs,  # of a strip
    strip1,
    strip2,
    column1,
    column2,
    scaling0,
    scaling1,
    scaling2,
    of_gb,  # how many programs add up the parts of g B of one adapter
    COUNT: tl.constexpr,  # adapters
    R: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if program < of_gb * COUNT:
        which = program // of_gb
        place = (program % of_gb).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < tokens.to(tl.int64) * R
        first, end = _of(which, 0, strip1, strip2).to(tl.int64), _of(which, strip1, strip2, strips).to(tl.int64)
        total = sum_of_parts(gb_parts, place, inside, first, end, tokens.to(tl.int64) * R, ROWS, BLOCK)
        total *= _of(which, scaling0, scaling1, scaling2)
        column = _of(which, 0, column1, column2) + place % R
        inside = inside & (column < _of(which, column1, column2, rank))
        token = place // R
        store_rounded(gb_ptr, normed_ptr, rstd_ptr, token, token * rank + column, inside, total)
    else:
        place = (program - of_gb * COUNT).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < channels.to(tl.int64) * R
        end, stride = programs.to(tl.int64), channels.to(tl.int64) * R
        total = sum_of_parts(b_parts, place, inside, end * 0, end, stride, ROWS, BLOCK)
        tl.store(of_b_ptr + place, total, mask=inside)


class _Layout(NamedTuple):
    """What follows from the places: the adapters' ranks, R and the units of the kernels, and where strips begin."""

    ranks: list[int]
    width: int
    rank_unit: int
    strips: int
    second_and_third: list[int]  # their first strips, rows and columns; where the last one ends if they are not there


@functools.lru_cache(maxsize=1024)
def _layout(places: Places) -> _Layout:
    rows, columns = places
    ranks = [end - start for start, end in itertools.pairwise(columns)]
    strips = [0, *itertools.accumulate(triton.cdiv(end - start, CHANNELS) for start, end in itertools.pairwise(rows))]
    starts = [part for each in (strips, rows, columns) for part in (each[1], each[min(2, len(ranks))])]
    return _Layout(ranks, max(16, power_of_2(max(ranks))), stride_unit(*columns), strips[-1], starts)


@functools.lru_cache
def _here(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == ARCHITECTURE


def suits(g: torch.Tensor, xa: torch.Tensor, b: torch.Tensor, places: Places) -> bool:
    """See :func:`fastplug.ops.adapter_gradients.reference.suits`."""
    if torch.compiler.is_compiling():  # a guard on the number of tokens would compile a layer twice
        return False
    tokens, channels = g.shape
    if tokens < FEWEST or channels > WIDEST or len(places.rows) > 1 + MOST or not _here(g.device):
        return False
    if g.dtype not in (torch.bfloat16, torch.float16) or not g.dtype == xa.dtype == b.dtype:
        return False
    if not (xa.is_contiguous() and b.is_contiguous() and g.stride(1) == 1):
        return False
    return _layout(places).width <= LARGEST_RANK


def gradients(
    g: torch.Tensor,
    xa: torch.Tensor,
    b: torch.Tensor,
    places: Places,
    scalings: Sequence[float],
    rstd: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor | None]:
    """See :func:`fastplug.ops.adapter_gradients.reference.gradients`; of tensors that :func:`suits` takes."""
    (tokens, channels), rank, device = g.shape, xa.shape[1], g.device
    ranks, R, rank_unit, strips, (strip1, strip2, row1, row2, column1, column2) = _layout(places)
    programs = triton.cdiv(tokens, TOKENS * BLOCKS)
    gb_parts = torch.empty(strips, tokens, R, dtype=torch.float32, device=device)
    b_parts = torch.empty(programs, channels, R, dtype=torch.float32, device=device)
    gb, of_b = torch.empty_like(xa), torch.empty(channels, R, dtype=torch.float32, device=device)
    normed = None if rstd is None else torch.empty_like(gb)
    unit, of_gb = stride_unit(g.stride(0), *places.rows), triton.cdiv(tokens * R, SUM_BLOCK)
    with on_device(g):
        launched(_products_kernel, (programs * strips,))(
            g, xa, b, gb_parts, b_parts, g.stride(0) // unit, tokens, channels // unit, rank // rank_unit, strips,
            strip1, strip2, row1 // unit, row2 // unit, column1 // rank_unit, column2 // rank_unit, UNIT=unit,
            RANK_UNIT=rank_unit, R=R, TOKENS=TOKENS, CHANNELS=CHANNELS, BLOCKS=BLOCKS, STAGES=STAGES, num_warps=WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
        launched(_sum_kernel, (of_gb * len(ranks) + triton.cdiv(channels * R, SUM_BLOCK),))(
            gb_parts, b_parts, gb, normed, rstd, of_b, tokens, channels, rank, strips, programs, strip1, strip2,
            column1, column2, *[*scalings, 1.0, 1.0][:MOST], of_gb, COUNT=len(ranks), R=R, ROWS=SUM_ROWS,
            BLOCK=SUM_BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    parts = tuple(of_b[start:end, :its] for (start, end), its in zip(itertools.pairwise(places.rows), ranks))
    return gb, parts, normed
