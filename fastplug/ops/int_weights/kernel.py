"""Integer weights in Triton, in one launch. The functions are those of ``reference``.

Two kernels. In ``_along_k`` the codes of a word are neighbours in a row, in ``_along_n`` they belong to different rows.
Each loads a tile of words, the memory's way round, and stores a tile of the weight in rows. Where a tile lies within
one group of columns, which is so for all common group sizes, a row of it needs one scale. Tiles of ``_along_k`` are
[words, rows, codes of a word]: of several dimensions as good as each other the compiler gives neighbouring threads
the first, and these store whole stretches of a row so.

Every operation is rounded to the dtype of the scales, as PyTorch rounds it, and none is contracted: the result is that
of the owning library, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastplug.ops.ahead import launched
from fastplug.ops.configs import config
from fastplug.ops.int_weights import reference
from fastplug.ops.int_weights.reference import Layout, check
from fastplug.ops.launch import check_output, on_device, power_of_2, stride_unit
from fastplug.ops.library import custom_op

SIGNS = {"unsigned": 0, "twos": 1, "offset": 2}


@triton.jit
def _stream(words_ptr, begin, stride, mask, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """The code that begins at bit ``begin`` of a stream of words of WIDTH bits."""
    word, shift = begin // WIDTH, begin % WIDTH
    low = tl.load(words_ptr + word.to(tl.int64) * stride, mask=mask, other=0).to(tl.uint32)
    if WIDTH == 8:
        low &= 255
    code = low >> shift.to(tl.uint32)
    if WIDTH % BITS != 0:
        over = mask & (shift + BITS > WIDTH)
        high = tl.load(words_ptr + (word.to(tl.int64) + 1) * stride, mask=over, other=0).to(tl.uint32)
        code |= high << ((WIDTH - shift) % WIDTH).to(tl.uint32)  # a shift by the whole width means nothing
    return (code & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _awq_place(column):
    """See ``reference.AWQ_PLACES``."""
    return column // 8 * 8 + column % 8 // 2 + column % 2 * 4


@triton.jit
def _weight(
    code,
    n,
    group,
    mask,  # of n and group
    scales_ptr,
    zeros_ptr,
    scale_n,
    scale_g,
    zero_n,
    zero_g,
    period,
    factor,
    BITS: tl.constexpr,
    SIGN: tl.constexpr,
    PACKED_ZEROS: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    AWQ: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    WRAP: tl.constexpr,
):
    if SIGN == 1:
        code = (code ^ (1 << (BITS - 1))) - (1 << (BITS - 1))
    if SIGN == 2:
        code = code - (1 << (BITS - 1))
    row = (n % period if WRAP else n).to(tl.int64)
    group = group.to(tl.int64)
    scale = tl.load(scales_ptr + row * scale_n + group * scale_g, mask=mask, other=0.0)
    dtype = scale.dtype
    value = code.to(tl.float32)
    if zeros_ptr is not None:
        if PACKED_ZEROS:
            place = _awq_place(n) if AWQ else n
            zero = _stream(zeros_ptr + group * zero_g, place * BITS, zero_n, mask, BITS, 32)
            if PLUS_ONE:
                zero = (zero + 1) & ((1 << BITS) - 1)
        else:
            zero = tl.load(zeros_ptr + row * zero_n + group * zero_g, mask=mask, other=0)
        if ADD:
            value = (value * scale.to(tl.float32)).to(dtype).to(tl.float32) + zero.to(dtype).to(tl.float32)
        else:
            value = (value - zero.to(dtype).to(tl.float32)).to(dtype).to(tl.float32) * scale.to(tl.float32)
    else:
        value = value * scale.to(tl.float32)
    if SCALED:
        value = value.to(dtype).to(tl.float32) * factor
    return value.to(dtype)


@triton.jit(do_not_specialize=["row_start", "period"])
def _along_k(
    codes_ptr,
    scales_ptr,
    zeros_ptr,  # or None
    g_idx_ptr,  # [K] or None
    out_ptr,  # [rows, K]
    code_n,  # strides of codes, in words
    code_w,
    scale_n,
    scale_g,
    zero_n,
    zero_g,
    out_stride,  # in units of UNIT elements
    row_start,
    rows,
    K,
    words_in_row,  # of E codes each, the last one included
    period,
    factor,
    BITS: tl.constexpr,
    SIGN: tl.constexpr,
    PACKED_ZEROS: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    WRAP: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,  # bits of a word
    E: tl.constexpr,  # codes in a word; 1 where they straddle words: then each is looked for in the stream
    UNIT: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    local = tl.program_id(0) * BN + tl.arange(0, BN)
    n = row_start + local
    first = tl.program_id(1) * BW
    word = first + tl.arange(0, BW)
    row_mask = local < rows
    there = (word < words_in_row)[:, None] & row_mask[None, :]  # in words, so that several can be loaded at once
    mask = (word * E < K)[:, None] & row_mask[None, :]
    e = tl.arange(0, E)[None, None, :]
    k = word[:, None, None] * E + e
    row_ptr = codes_ptr + n.to(tl.int64) * code_n
    if E * BITS == WIDTH:
        words = tl.load(row_ptr[None, :] + word.to(tl.int64)[:, None] * code_w, mask=there, other=0).to(tl.int32)
        code = (words[:, :, None] >> (e * BITS)) & ((1 << BITS) - 1)
    else:
        code = _stream(row_ptr[None, :, None], k * BITS, code_w, mask[:, :, None], BITS, WIDTH)
    if g_idx_ptr is not None:
        group = tl.load(g_idx_ptr + k, mask=k < K, other=0)
        at, group_mask = n[None, :, None], mask[:, :, None]
    elif GROUP % (BW * E) == 0:
        group = first * E // GROUP + tl.zeros([1, 1, 1], tl.int32)
        at, group_mask = n[None, :, None], row_mask[None, :, None]
    else:
        group = k // GROUP
        at, group_mask = n[None, :, None], mask[:, :, None]
    value = _weight(
        code, at, group, group_mask, scales_ptr, zeros_ptr, scale_n, scale_g, zero_n, zero_g, period, factor,
        BITS, SIGN, PACKED_ZEROS, PLUS_ONE, False, ADD, SCALED, WRAP,
    )  # fmt: skip
    target = out_ptr + local.to(tl.int64)[None, :, None] * (out_stride * UNIT) + k
    tl.store(target, value.to(out_ptr.dtype.element_ty), mask=mask[:, :, None])


@triton.jit(do_not_specialize=["row_start", "period"])
def _along_n(
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    code_m,
    code_k,
    scale_n,
    scale_g,
    zero_n,
    zero_g,
    out_stride,
    row_start,
    rows,
    K,
    M,  # words in a column of codes
    period,
    factor,
    BITS: tl.constexpr,
    SIGN: tl.constexpr,
    PACKED_ZEROS: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    WRAP: tl.constexpr,
    GROUP: tl.constexpr,
    AWQ: tl.constexpr,
    PARTS: tl.constexpr,  # codes in a word
    E: tl.constexpr,  # PARTS, or the next power of two
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    if AWQ:
        m += row_start // PARTS
    first = tl.program_id(1) * BK
    k = first + tl.arange(0, BK)
    words = tl.load(
        codes_ptr + m.to(tl.int64)[:, None] * code_m + k.to(tl.int64)[None, :] * code_k,
        mask=(m < M)[:, None] & (k < K)[None, :],
        other=0,
    ).to(tl.int32)
    e = tl.arange(0, E)[None, :]
    if AWQ:
        n = m[:, None] * PARTS + e
        shift = _awq_place(e) * BITS
    else:
        n = e * M + m[:, None]
        shift = tl.maximum(PARTS - 1 - e, 0) * BITS
    local = n - row_start
    row_mask = (local >= 0) & (local < rows) & (m < M)[:, None] & (e < PARTS)
    mask = row_mask[:, :, None] & (k < K)[None, None, :]
    code = (words[:, None, :] >> shift[:, :, None]) & ((1 << BITS) - 1)
    if GROUP % BK == 0:
        group, group_mask = first // GROUP + tl.zeros([1, 1, 1], tl.int32), row_mask[:, :, None]
    else:
        group, group_mask = (k // GROUP)[None, None, :], mask
    value = _weight(
        code, n[:, :, None], group, group_mask, scales_ptr, zeros_ptr, scale_n, scale_g, zero_n, zero_g, period, factor,
        BITS, SIGN, PACKED_ZEROS, PLUS_ONE, AWQ, ADD, SCALED, WRAP,
    )  # fmt: skip
    target = out_ptr + local.to(tl.int64)[:, :, None] * (out_stride * UNIT) + k[None, None, :]
    tl.store(target, value.to(out_ptr.dtype.element_ty), mask=mask)


@custom_op("out")
def int_decode(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    out: torch.Tensor,
    N: int,
    bits: int,
    packing: str,
    group: int,
    sign: str,
    packed_zeros: bool,
    zero_plus_one: bool,
    add_zero: bool,
    factor: float,
    row_start: int,
) -> None:
    """The launcher behind :func:`decode`; the arguments after ``out`` are those of ``Layout``."""
    rows, K = out.shape
    if out.numel() == 0:
        return
    scale_n = 0 if len(scales) == 1 else scales.stride(0)
    scale_g = 0 if scales.shape[1] == 1 else scales.stride(1)
    zero_n, zero_g = (0, 0) if zeros is None else zeros.stride()
    if zeros is not None and not packed_zeros:
        zero_n, zero_g = (0 if len(scales) == 1 else zero_n), (0 if scales.shape[1] == 1 else zero_g)
    stride = out.stride(0) if rows > 1 else K
    unit = stride_unit(stride)
    wrap = len(scales) not in (1, N)
    if scales.shape[1] == 1 and g_idx is None:
        group = power_of_2(K)  # one group, whatever the width: every tile lies within it
    columns = min(128, group & -group) if group % 16 == 0 else 128
    tile = config(out.device).decoded
    numbers = (scale_n, scale_g, zero_n, zero_g, stride // unit, row_start, rows, K)
    flags = (bits, SIGNS[sign], packed_zeros, zero_plus_one, add_zero, factor != 1.0, wrap, group)
    with on_device(out):
        if packing in ("row", "input"):
            codes, code_n, code_w, width, E = _words(codes, packing, bits, N, K)
            words = max(min(columns, power_of_2(K)) // E, 1)
            tile = tile if g_idx is None else tile // 2  # a scale of its own for each code takes registers
            BN = min(tile // (words * E), power_of_2(rows))
            grid = (triton.cdiv(rows, BN), triton.cdiv(K, words * E))
            launched(_along_k, grid)(
                codes, scales, zeros, g_idx, out, code_n, code_w, *numbers, -(-K // E), len(scales), factor, *flags,
                width, E, unit, BN, words, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        else:
            awq, parts = packing == "output", 8 * codes.element_size() // bits
            M, code_m, code_k = (N // parts, 1, N // parts) if awq else (codes.numel() // K, K, 1)
            E, BK = power_of_2(parts), min(columns, power_of_2(K), 64)  # eight words of a row fill a sector
            touched = (row_start + rows - 1) // parts - row_start // parts + 1 if awq else M
            BM = max(min(tile // (E * BK), power_of_2(touched)), 1)
            launched(_along_n, (triton.cdiv(touched, BM), triton.cdiv(K, BK)))(
                codes, scales, zeros, out, code_m, code_k, *numbers, M, len(scales), factor, *flags, awq, parts, E,
                unit, BM, BK, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip


def _words(codes: torch.Tensor, packing: str, bits: int, N: int, K: int) -> tuple[torch.Tensor, int, int, int, int]:
    """The codes as words, the strides of rows and of words, the bits of a word, and into how many codes to cut it."""
    if packing == "input":
        whole = 32 % bits == 0 and K * bits % 32 == 0
        return codes, 1, N, 32, 32 // bits if whole else 1
    codes = codes.view(torch.uint8)
    width = codes.numel() // N
    if bits in (2, 4) and K * bits % 32 == 0 and codes.storage_offset() % 4 == 0:
        return codes.view(torch.int32), width // 4, 1, 32, 32 // bits
    return codes, width, 1, 8, 1


def decode(
    codes: torch.Tensor,
    scales: torch.Tensor,
    layout: Layout,
    out: torch.Tensor,
    *,
    zeros: torch.Tensor | None = None,
    g_idx: torch.Tensor | None = None,
    row_start: int = 0,
) -> None:
    """See :func:`fastplug.ops.int_weights.reference.decode`. Nothing is read back to the host."""
    check(codes, scales, layout, out, zeros, g_idx, row_start)
    check_output("out", out, out.shape)
    if layout.packing == "split" and codes.numel() % layout.shape[1]:  # a part ends within a row
        reference.decode(codes, scales, layout, out, zeros=zeros, g_idx=g_idx, row_start=row_start)
        return
    arguments: list[Any] = [layout.shape[0], *layout[1:], row_start]
    int_decode(codes.contiguous(), scales, zeros, g_idx, out, *arguments)
