"""The Triton kernels of integer weights, one for each way in which codes lie.

In :func:`along_k` the codes of a word are neighbours in a row, in :func:`along_n` (AWQ) and :func:`in_parts` (HQQ) they
belong to different rows. Each loads a tile of words, the memory's way round, and stores a tile of the weight in rows.
Where a tile lies within one group of columns, which is so for all common group sizes, a row of it needs one scale.
Where every column has a group of its own, :func:`in_act_order` reads the scale and the zero point of each code as one
word of a :func:`table`. Tiles of :func:`along_k` are [words, rows, codes of a word]: of several dimensions as good as
each other the compiler gives neighbouring threads the first, and these store whole stretches of a row so.

Every operation is rounded to the dtype of the scales, as PyTorch rounds it, and none is contracted: the result is that
of the owning library, bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def _three_bits(words_ptr, word, stride, e, mask):
    """Codes e < 32 of 3 bits of the stream of int32 words that begins at ``word``: they lie in three words.

    Code e begins at bit 3 e: the first sixteen end within the first two words, the others begin in the second.
    """
    word = word.to(tl.int64) * stride
    first = tl.load(words_ptr + word, mask=mask, other=0).to(tl.uint32).to(tl.uint64)
    second = tl.load(words_ptr + word + stride, mask=mask, other=0).to(tl.uint32).to(tl.uint64)
    third = tl.load(words_ptr + word + 2 * stride, mask=mask, other=0).to(tl.uint32).to(tl.uint64)
    low, high = (second << 32) | first, (third << 32) | second
    begin = (3 * e - tl.where(e < 16, 0, 32)).to(tl.uint64)
    return (tl.where(e < 16, low[:, :, None], high[:, :, None]) >> begin).to(tl.int32) & 7


@triton.jit
def _signed(code, BITS: tl.constexpr, SIGN: tl.constexpr):
    """What a code means: unsigned, in twos complement (1), or less half of its range (2)."""
    if SIGN == 1:
        code = (code ^ (1 << (BITS - 1))) - (1 << (BITS - 1))
    if SIGN == 2:
        code = code - (1 << (BITS - 1))
    return code


@triton.jit
def _awq_place(column):
    """See ``reference.AWQ_PLACES``."""
    return column // 8 * 8 + column % 8 // 2 + column % 2 * 4


@triton.jit
def _zero(
    zeros_ptr,
    n,
    row,  # n, or n modulo the period of the scales
    group,
    mask,
    zero_n,
    zero_g,
    BITS: tl.constexpr,
    PACKED: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    AWQ: tl.constexpr,
):
    if PACKED:
        place = _awq_place(n) if AWQ else n
        zero = _stream(zeros_ptr + group * zero_g, place * BITS, zero_n, mask, BITS, 32)
        if PLUS_ONE:
            zero = (zero + 1) & ((1 << BITS) - 1)
    else:
        zero = tl.load(zeros_ptr + row * zero_n + group * zero_g, mask=mask, other=0)
    return zero


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
    code = _signed(code, BITS, SIGN)
    row = (n % period if WRAP else n).to(tl.int64)
    group = group.to(tl.int64)
    scale = tl.load(scales_ptr + row * scale_n + group * scale_g, mask=mask, other=0.0)
    dtype = scale.dtype
    value = code.to(tl.float32)
    if zeros_ptr is not None:
        zero = _zero(zeros_ptr, n, row, group, mask, zero_n, zero_g, BITS, PACKED_ZEROS, PLUS_ONE, AWQ)
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
def along_k(
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
    E: tl.constexpr,  # codes in a word, or 32 of 3 bits in three; 1 where each is looked for in the stream
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
    elif E == 32:
        code = _three_bits(row_ptr[None, :], word[:, None] * BITS, code_w, e, there)
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


@triton.jit
def in_act_order(
    codes_ptr,
    entries_ptr,  # int32 [G, rows], see table
    g_idx_ptr,  # [K]
    out_ptr,  # [rows, K]
    code_n,
    code_w,
    out_stride,
    rows,
    K,
    words_in_row,
    BITS: tl.constexpr,
    SIGN: tl.constexpr,
    DTYPE: tl.constexpr,  # of the scales
    E: tl.constexpr,
    UNIT: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """Every column has a group of its own. Neighbouring threads have neighbouring rows, so that they read entries in
    whole stretches, and the tile is turned when it is stored."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    word = tl.program_id(1) * BW + tl.arange(0, BW)
    e = tl.arange(0, E)
    mask = (word < words_in_row)[:, None] & (n < rows)[None, :]
    words = tl.load(
        codes_ptr + word.to(tl.int64)[:, None] * code_w + n.to(tl.int64)[None, :] * code_n, mask=mask, other=0
    ).to(tl.int32)
    code = (words[:, None, :] >> (e * BITS)[None, :, None]) & ((1 << BITS) - 1)
    code = _signed(code, BITS, SIGN)
    group = tl.load(g_idx_ptr + word[:, None] * E + e[None, :], mask=(word < words_in_row)[:, None], other=0)
    entry = tl.load(entries_ptr + group[:, :, None] * rows + n[None, None, :], mask=mask[:, None, :], other=0)
    scale = entry.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    value = ((code - (entry >> 16)).to(tl.float32) * scale).to(DTYPE)  # the difference is exact in every dtype
    tile = tl.trans(tl.reshape(value, [BW * E, BN]))
    k = tl.program_id(1) * (BW * E) + tl.arange(0, BW * E)
    target = out_ptr + n.to(tl.int64)[:, None] * (out_stride * UNIT) + k[None, :]
    tl.store(target, tile.to(out_ptr.dtype.element_ty), mask=(n < rows)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["row_start"])
def table(
    scales_ptr,
    zeros_ptr,  # or None
    entries_ptr,  # int32 [G, rows]
    scale_n,
    scale_g,
    zero_n,
    zero_g,
    row_start,
    rows,
    BITS: tl.constexpr,
    PACKED_ZEROS: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A scale of 16 bits and, above it, its zero point."""
    local, group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    mask = local < rows
    n = row_start + local
    row = n.to(tl.int64)
    scale = tl.load(scales_ptr + row * scale_n + group * scale_g, mask=mask, other=0.0)
    entry = scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    if zeros_ptr is not None:
        zero = _zero(zeros_ptr, n, row, group, mask, zero_n, zero_g, BITS, PACKED_ZEROS, PLUS_ONE, False)
        entry |= zero.to(tl.int32) << 16
    tl.store(entries_ptr + group * rows + local, entry, mask=mask)


@triton.jit(do_not_specialize=["row_start", "period"])
def along_n(
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    scale_n,
    scale_g,
    zero_n,
    zero_g,
    out_stride,
    row_start,
    rows,
    K,
    M,  # words in a row of codes
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
    E: tl.constexpr,  # codes in a word
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    m = row_start // E + tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * BK
    k = first + tl.arange(0, BK)
    words = tl.load(
        codes_ptr + m.to(tl.int64)[:, None] + k.to(tl.int64)[None, :] * M,
        mask=(m < M)[:, None] & (k < K)[None, :],
        other=0,
    )
    e = tl.arange(0, E)[None, :]
    n = m[:, None] * E + e
    local = n - row_start
    row_mask = (local >= 0) & (local < rows)
    mask = row_mask[:, :, None] & (k < K)[None, None, :]
    code = (words[:, None, :] >> (_awq_place(e) * BITS)[:, :, None]) & ((1 << BITS) - 1)
    if GROUP % BK == 0:
        group, group_mask = first // GROUP + tl.zeros([1, 1, 1], tl.int32), row_mask[:, :, None]
    else:
        group, group_mask = (k // GROUP)[None, None, :], mask
    value = _weight(
        code, n[:, :, None], group, group_mask, scales_ptr, zeros_ptr, scale_n, scale_g, zero_n, zero_g, period, factor,
        BITS, SIGN, PACKED_ZEROS, PLUS_ONE, True, ADD, SCALED, WRAP,
    )  # fmt: skip
    target = out_ptr + local.to(tl.int64)[:, :, None] * (out_stride * UNIT) + k[None, None, :]
    tl.store(target, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["row_start", "period"])
def in_parts(
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    scale_n,
    scale_g,
    zero_n,
    zero_g,
    out_stride,
    row_start,
    rows,
    K,
    M,  # words, of which each part has a code
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
    PARTS: tl.constexpr,  # codes in a word
    E: tl.constexpr,  # PARTS, or the next power of two
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,  # words in a run: divides K and M, so that a run's codes lie in one row in every part
):
    first = (tl.program_id(0) * BM + tl.arange(0, BM)) * BK
    column = tl.arange(0, BK)
    words = tl.load(codes_ptr + first.to(tl.int64)[:, None] + column[None, :], mask=(first < M)[:, None], other=0).to(
        tl.int32
    )
    e = tl.arange(0, E)[None, :]
    begin = e * M + first[:, None]
    n = begin // K
    begin -= n * K
    local = n - row_start
    mask = ((local >= 0) & (local < rows) & (first < M)[:, None] & (e < PARTS))[:, :, None]
    code = (words[:, None, :] >> (tl.maximum(PARTS - 1 - e, 0) * BITS)[:, :, None]) & ((1 << BITS) - 1)
    k = begin[:, :, None] + column[None, None, :]
    group = (begin // GROUP)[:, :, None] if GROUP % BK == 0 else k // GROUP
    value = _weight(
        code, n[:, :, None], group, mask, scales_ptr, zeros_ptr, scale_n, scale_g, zero_n, zero_g, period, factor,
        BITS, SIGN, PACKED_ZEROS, PLUS_ONE, False, ADD, SCALED, WRAP,
    )  # fmt: skip
    target = out_ptr + local.to(tl.int64)[:, :, None] * (out_stride * UNIT) + k
    tl.store(target, value.to(out_ptr.dtype.element_ty), mask=mask)
