"""Weights of small floats in Triton. The functions are those of ``reference``.

The bits of a value become those of an fp16 number of the same exponent, which a power of two then puts right: exact,
subnormal values included, and on every GPU, also those that know no FP8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastplug.ops.ahead import launched
from fastplug.ops.configs import config
from fastplug.ops.float_weights.reference import Layout, check
from fastplug.ops.launch import check_output, on_device, power_of_2, stride_unit
from fastplug.ops.library import custom_op

FORMATS = {"float": 0, "e4m3": 1, "e5m2": 2, "e2m1": 3, "e8m0": 4}


@triton.jit
def _float32(code, FORMAT: tl.constexpr):
    """The fp32 value of the lowest bits of an int32."""
    if FORMAT == 4:
        bits = tl.where(code == 0, 1 << 22, code << 23)  # 2**-127 is subnormal
        value = tl.where(code == 255, float("nan"), bits.to(tl.float32, bitcast=True))
    else:
        if FORMAT == 1:
            half = ((code & 0x7F) << 7) | ((code & 0x80) << 8)
        elif FORMAT == 2:
            half = code << 8
        else:
            half = ((code & 7) << 9) | ((code & 8) << 12)
        value = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        if FORMAT == 1:
            value = tl.where((code & 0x7F) == 0x7F, float("nan"), value * 256.0)
        elif FORMAT == 3:
            value *= 16384.0
    return value


@triton.jit(do_not_specialize=["row_start"])
def _kernel(
    codes_ptr,  # bytes, or int32 words of eight 4-bit values
    scales_ptr,
    outer_ptr,  # [1] fp32 or None
    out_ptr,  # [rows, K]
    code_n,
    scale_n,
    scale_g,
    out_stride,  # in units of UNIT elements
    row_start,
    rows,
    K,
    words_in_row,
    VALUE: tl.constexpr,
    SCALE: tl.constexpr,
    DIVIDE: tl.constexpr,
    HIGH: tl.constexpr,  # rows and columns of a block
    WIDE: tl.constexpr,
    E: tl.constexpr,  # values in a word
    UNIT: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    local = tl.program_id(0) * BN + tl.arange(0, BN)
    n = row_start + local
    first = tl.program_id(1) * BW
    word = first + tl.arange(0, BW)
    row_mask = local < rows
    # Tiles are [words, rows, values of a word]: neighbouring threads get neighbouring words, and so store whole
    # stretches of a row. The mask is in words, so that the compiler can load several at once.
    mask = (word < words_in_row)[:, None] & row_mask[None, :]
    k = word[:, None, None] * E + tl.arange(0, E)[None, None, :]
    words = tl.load(codes_ptr + n.to(tl.int64)[None, :] * code_n + word[:, None], mask=mask, other=0).to(tl.int32)
    code = (words[:, :, None] >> (tl.arange(0, E)[None, None, :] * 4)) & 15 if E > 1 else words[:, :, None] & 255
    if WIDE % (BW * E) == 0:
        group, scale_mask = first * E // WIDE + tl.zeros([1, 1], tl.int32), row_mask[None, :]
    else:
        group, scale_mask = (word * E // WIDE)[:, None], mask
    at = scales_ptr + (n // HIGH).to(tl.int64)[None, :] * scale_n + group.to(tl.int64) * scale_g
    scale = tl.load(at, mask=scale_mask, other=0)
    scale = scale.to(tl.float32) if SCALE == 0 else _float32(scale.to(tl.int32), SCALE)
    if outer_ptr is not None:
        outer = tl.load(outer_ptr)
        scale = tl.div_rn(scale, outer + tl.zeros_like(scale)) if DIVIDE else scale * outer
    value = _float32(code, VALUE) * scale[:, :, None]
    target = out_ptr + local.to(tl.int64)[None, :, None] * (out_stride * UNIT) + k
    tl.store(target, value.to(out_ptr.dtype.element_ty), mask=mask[:, :, None])


@custom_op("out")
def float_decode(
    codes: torch.Tensor,
    scales: torch.Tensor,
    outer: torch.Tensor | None,
    out: torch.Tensor,
    value: str,
    high: int,
    wide: int,
    scale: str,
    divide: bool,
    row_start: int,
) -> None:
    """The launcher behind :func:`decode`; ``codes`` are bytes [N, ...], ``high`` and ``wide`` the block."""
    rows, K = out.shape
    if out.numel() == 0:
        return
    E = 8 if value == "e2m1" else 1
    scale_n = 0 if len(scales) == 1 else scales.stride(0)
    scale_g = 0 if scales.shape[1] == 1 else scales.stride(1)
    high = 1 << 30 if len(scales) == 1 else high
    wide = power_of_2(K) if scales.shape[1] == 1 else wide
    columns = wide if E == 1 and wide in (32, 64) else 128
    BW = max(min(columns, power_of_2(K)) // E, 1)
    BN = min(config(out.device).decoded // (BW * E), power_of_2(rows))
    stride = out.stride(0) if rows > 1 else K
    unit = stride_unit(stride)
    words = codes
    if E > 1:
        words = codes.view(torch.int32) if codes.storage_offset() % 4 == 0 else codes.clone().view(torch.int32)
    with on_device(out):
        launched(_kernel, (triton.cdiv(rows, BN), triton.cdiv(K, BW * E)))(
            words, scales, outer, out, K // E, scale_n, scale_g, stride // unit, row_start, rows, K, K // E,
            FORMATS[value], FORMATS[scale], divide, high, wide, E, unit, BN, BW, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def decode(
    codes: torch.Tensor,
    scales: torch.Tensor,
    layout: Layout,
    out: torch.Tensor,
    *,
    outer: torch.Tensor | None = None,
    row_start: int = 0,
) -> None:
    """See :func:`fastplug.ops.float_weights.reference.decode`. Nothing is read back to the host."""
    check(codes, scales, layout, out, outer, row_start)
    check_output("out", out, out.shape)
    _, value, (high, wide), scale, divide = layout
    codes = codes.contiguous().view(torch.uint8)
    scales = scales if scale == "float" else scales.view(torch.uint8)
    float_decode(codes, scales, outer, out, value, high, wide, scale, divide, row_start)
