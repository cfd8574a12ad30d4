"""4-bit decoding in Triton, one launch also with double quantization. The functions are those of ``reference``.

The fast kernel reads the packed weight as 32-bit words of eight elements each, so that a thread's word becomes one
16-byte store of a 16-bit dtype. It needs eight elements of a word to lie in one row (K a multiple of 8); the other
kernel goes element by element and takes any K. Both are launched without contraction of multiply and add: one rounding
instead of two would differ from bitsandbytes in the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastplug.ops.ahead import launched
from fastplug.ops.configs import config
from fastplug.ops.launch import check_output, on_device, stride_unit
from fastplug.ops.library import custom_op
from fastplug.ops.nf4.reference import Nested, Stored, check

MOST = 3  # weights that a launch decodes
SINGLE = (None, None, None, 0)  # in the place of what double quantization has
ELEMENTS = 1024  # of a program of the kernel that goes element by element


@triton.jit
def _scale(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, mask, BLOCKSIZE2: tl.constexpr):
    scale = tl.load(absmax_ptr + block, mask=mask, other=0)
    if code2_ptr is not None:
        outer = tl.load(absmax2_ptr + block // BLOCKSIZE2, mask=mask, other=0.0)
        scale = tl.load(code2_ptr + scale.to(tl.int32)) * outer + tl.load(offset_ptr)
    return scale


@triton.jit
def _values(
    packed_ptr, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, word, mask, WORDS_PER_BLOCK: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
):  # fmt: skip
    """The elements [words, 8] of some words of a weight."""
    packed = tl.load(packed_ptr + word, mask=mask, other=0)
    block = word // WORDS_PER_BLOCK
    scale = _scale(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, mask, BLOCKSIZE2)
    element = tl.arange(0, 8)[None, :]
    nibble = (packed[:, None] >> ((element ^ 1) * 4)) & 15  # little-endian bytes, the high half of each first
    return tl.load(code_ptr + nibble) * scale[:, None]


@triton.jit
def _stacked(
    packed_ptr, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, out_ptr, program, words,
    WORDS_PER_BLOCK: tl.constexpr, BLOCKSIZE2: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One program's words of one of several weights, whose rows begin at ``out_ptr``."""
    word = program.to(tl.int64) * WORDS + tl.arange(0, WORDS)
    mask = word < words
    value = _values(
        packed_ptr, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, word, mask, WORDS_PER_BLOCK, BLOCKSIZE2
    )
    target = word[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out_ptr + target, value.to(out_ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit(do_not_specialize=["words0", "words1", "words2", "programs0", "programs1"])
def _stacked_kernel(
    packed0, absmax0, code0, code20, absmax20, offset0, packed1, absmax1, code1, code21, absmax21, offset1, packed2,
    absmax2, code2, code22, absmax22, offset2,  # as of _word_kernel; the third weight's may be None
    out_ptr,  # [rows of all, K]
    words0,
    words1,
    words2,
    programs0,  # of the first weight
    programs1,  # of the first two
    WORDS_PER_BLOCK: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    second = out_ptr + words0.to(tl.int64) * 8
    if program < programs0:
        _stacked(
            packed0, absmax0, code0, code20, absmax20, offset0, out_ptr, program, words0, WORDS_PER_BLOCK, BLOCKSIZE2,
            WORDS,
        )  # fmt: skip
    elif program < programs1:
        _stacked(
            packed1, absmax1, code1, code21, absmax21, offset1, second, program - programs0, words1, WORDS_PER_BLOCK,
            BLOCKSIZE2, WORDS,
        )  # fmt: skip
    else:
        if packed2 is not None:
            _stacked(
                packed2, absmax2, code2, code22, absmax22, offset2, second + words1.to(tl.int64) * 8,
                program - programs1, words2, WORDS_PER_BLOCK, BLOCKSIZE2, WORDS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["row_start"])
def _word_kernel(
    packed_ptr,  # int32 words of the whole weight
    absmax_ptr,  # [blocks] fp32, or uint8 with double quantization
    code_ptr,  # [16] fp32
    code2_ptr,  # [256] fp32 or None
    absmax2_ptr,  # [blocks / BLOCKSIZE2] fp32 or None
    offset_ptr,  # [] fp32 or None
    out_ptr,  # [N, K]
    out_stride,  # row stride in units of UNIT elements
    row_start,
    words,  # N * K / 8
    WORDS_PER_ROW: tl.constexpr,  # K / 8
    WORDS_PER_BLOCK: tl.constexpr,  # blocksize / 8
    BLOCKSIZE2: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    UNIT: tl.constexpr,
    WORDS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * WORDS
    word = tl.arange(0, WORDS)
    mask = first + word < words
    source = row_start.to(tl.int64) * WORDS_PER_ROW + first + word
    value = _values(
        packed_ptr, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, source, mask, WORDS_PER_BLOCK, BLOCKSIZE2
    )
    if CONTIGUOUS:
        target = first * 8 + word * 8
    else:
        index = first.to(tl.int32) + word
        target = (index // WORDS_PER_ROW).to(tl.int64) * (out_stride * UNIT) + (index % WORDS_PER_ROW) * 8
    target = target[:, None] + tl.arange(0, 8)[None, :]
    tl.store(out_ptr + target, value.to(out_ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit(do_not_specialize=["row_start"])
def _element_kernel(
    packed_ptr,  # uint8 bytes of the whole weight
    absmax_ptr,
    code_ptr,
    code2_ptr,
    absmax2_ptr,
    offset_ptr,
    out_ptr,  # [N, K]
    out_stride,
    row_start,
    elements,  # N * K
    K,
    BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = index < elements
    source = row_start.to(tl.int64) * K + index
    byte = tl.load(packed_ptr + source // 2, mask=mask, other=0).to(tl.int32)
    nibble = (byte >> tl.where(source % 2 == 0, 4, 0)) & 15
    scale = _scale(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, source // BLOCKSIZE, mask, BLOCKSIZE2)
    value = tl.load(code_ptr + nibble) * scale
    target = index // K * out_stride + index % K
    tl.store(out_ptr + target, value.to(out_ptr.dtype.element_ty), mask=mask)


@custom_op("out")
def nf4_decode(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    out: torch.Tensor,
    code2: torch.Tensor | None,
    absmax2: torch.Tensor | None,
    offset: torch.Tensor | None,
    blocksize: int,
    blocksize2: int,
    row_start: int,
) -> None:
    """Write rows from ``row_start`` on into ``out`` [N, K]; ``packed`` is flat uint8."""
    N, K = out.shape
    if out.numel() == 0:
        return
    stride = out.stride(0) if N > 1 else K
    words, whole = N * K // 8, packed.numel() // 4 * 4
    words_each = config(out.device).decoded // 8
    with on_device(out):
        if K % 8 == 0 and packed.storage_offset() % 4 == 0 and words < 2**31:
            unit = stride_unit(stride)
            launched(_word_kernel, (triton.cdiv(words, words_each),))(
                packed[:whole].view(torch.int32), absmax, code, code2, absmax2, offset, out, stride // unit, row_start,
                words, K // 8, blocksize // 8, blocksize2, stride == K, unit, words_each, num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip
        else:
            launched(_element_kernel, (triton.cdiv(N * K, ELEMENTS),))(
                packed, absmax, code, code2, absmax2, offset, out, stride, row_start, N * K, K,
                blocksize, blocksize2, ELEMENTS, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip


def decode_all(weights: Sequence[Stored], blocksize: int, out: torch.Tensor) -> bool:
    """See :func:`fastplug.ops.nf4.reference.decode_all`."""
    if not 2 <= len(weights) <= MOST or torch.compiler.is_compiling() or out.shape[1] % 8 or not out.is_contiguous():
        return False
    nested, operands, words, row = weights[0].nested, [], [], 0
    for weight in weights:
        mine = out[row : row + weight.rows]
        check(weight.packed, weight.absmax, blocksize, 0, mine, weight.nested)
        if (weight.nested is None) != (nested is None) or weight.packed.storage_offset() % 4:
            return False
        code2, absmax2, offset, blocksize2 = weight.nested or SINGLE
        if nested is not None and blocksize2 != nested[3]:
            return False
        flat = weight.packed.reshape(-1)
        operands += [flat[: len(flat) // 4 * 4].view(torch.int32), weight.absmax, weight.code, code2, absmax2, offset]
        words.append(mine.numel() // 8)
        row += weight.rows
    if row != len(out) or sum(words) >= 2**31:
        return False
    words_each = config(out.device).decoded // 8
    programs = [triton.cdiv(count, words_each) for count in words]
    missing = MOST - len(weights)
    with on_device(out):
        launched(_stacked_kernel, (sum(programs),))(
            *operands, *[None] * (6 * missing), out, *words, *[0] * missing, programs[0], sum(programs[:2]),
            blocksize // 8, 0 if nested is None else nested[3], words_each, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return True


def decode(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    out: torch.Tensor,
    *,
    nested: Nested | None = None,
    row_start: int = 0,
) -> None:
    """See :func:`fastplug.ops.nf4.reference.decode`. Nothing is read back to the host."""
    check(packed, absmax, blocksize, row_start, out, nested)
    check_output("out", out, out.shape)
    code2, absmax2, offset, blocksize2 = nested or SINGLE
    nf4_decode(packed.reshape(-1), absmax, code, out, code2, absmax2, offset, blocksize, blocksize2, row_start)
