"""FP8 quantization in Triton, and the product by PyTorch's ``_scaled_mm``. The functions are those of ``reference``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastplug.ops.ahead import launched
from fastplug.ops.configs import config
from fastplug.ops.fp8 import reference, share
from fastplug.ops.fp8.reference import FP8, LARGEST
from fastplug.ops.launch import check_output, on_device, power_of_2, stride_unit, unit_stride
from fastplug.ops.library import custom_op

ROW_BLOCK = 16384  # elements of a row that one program holds in registers; longer rows are read twice
TILE = 64  # of a transposition: 64 x 64 elements, 64-byte rows of the result


@triton.jit
def _rows_kernel(
    x_ptr,  # [M, K]
    q_ptr,  # [M, K] e4m3, contiguous
    scale_ptr,  # [M] fp32
    x_stride,  # row stride in units of UNIT elements
    K: tl.constexpr,
    LARGEST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * (x_stride * UNIT)
    q_ptr += row * K
    cols = tl.arange(0, BLOCK)
    if BLOCK >= K:
        x = tl.load(x_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
        amax = tl.max(tl.abs(x), axis=0)
    else:
        largest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, K, BLOCK):
            part = tl.load(x_ptr + start + cols, mask=start + cols < K, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(part))
        amax = tl.max(largest, axis=0)
    scale = tl.where(amax > 0, amax / LARGEST, 1.0)
    tl.store(scale_ptr + row, scale)
    inverse = 1.0 / scale
    if BLOCK >= K:
        q = tl.minimum(tl.maximum(x * inverse, -LARGEST), LARGEST)
        tl.store(q_ptr + cols, q.to(q_ptr.dtype.element_ty), mask=cols < K)
    else:
        for start in range(0, K, BLOCK):
            part = tl.load(x_ptr + start + cols, mask=start + cols < K, other=0.0).to(tl.float32)
            q = tl.minimum(tl.maximum(part * inverse, -LARGEST), LARGEST)
            tl.store(q_ptr + start + cols, q.to(q_ptr.dtype.element_ty), mask=start + cols < K)


@triton.jit
def _columns_kernel(
    w_ptr,  # [N, K]
    scale_ptr,  # [K] fp32
    q_ptr,  # [K, N] e4m3
    w_stride,  # row strides in units of UNIT elements
    q_stride,
    N,
    K,
    LARGEST: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = (n < N)[:, None] & (k < K)[None, :]
    w = tl.load(w_ptr + n[:, None] * (w_stride * UNIT) + k[None, :], mask=mask, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.load(scale_ptr + k, mask=k < K, other=1.0)
    q = tl.minimum(tl.maximum(w * inverse[None, :], -LARGEST), LARGEST).to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + k[:, None] * (q_stride * UNIT) + n[None, :], tl.trans(q), mask=tl.trans(mask))


@custom_op("q", "scale")
def fp8_quantize_rows(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> None:
    """Write ``q`` [M, K] and ``scale`` [M] for x [M, K], whose last dimension is contiguous."""
    M, K = x.shape
    if x.numel() == 0:
        return
    unit = stride_unit(x.stride(0))
    block = min(ROW_BLOCK, power_of_2(K))
    with on_device(x):
        launched(_rows_kernel, (M,))(
            x, q, scale, x.stride(0) // unit, K, LARGEST, unit, block,
            num_warps=max(4, min(16, block // config(x.device).per_warp(x.element_size()))), enable_fp_fusion=True,
        )  # fmt: skip


@custom_op("q")
def fp8_quantize_columns(w: torch.Tensor, scale: torch.Tensor, q: torch.Tensor) -> None:
    """Write ``q`` [K, N] for w [N, K]; both have contiguous last dimensions."""
    N, K = w.shape
    if w.numel() == 0:
        return
    unit = stride_unit(w.stride(0), q.stride(0))
    with on_device(w):
        launched(_columns_kernel, (triton.cdiv(N, TILE), triton.cdiv(K, TILE)))(
            w, scale, q, w.stride(0) // unit, q.stride(0) // unit, N, K, LARGEST, unit, TILE, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`fastplug.ops.fp8.reference.quantize_rows`."""
    x = unit_stride(x)
    q = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    fp8_quantize_rows(x, q, scale)
    return q, scale


def column_scales(w: torch.Tensor) -> torch.Tensor:
    """See :func:`fastplug.ops.fp8.reference.column_scales`: once for a frozen weight, so a plain reduction does."""
    low, high = torch.aminmax(w, dim=0)
    amax = torch.maximum(-low, high).float()
    return torch.where(amax > 0, amax / LARGEST, 1.0)


def quantize_columns(w: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See :func:`fastplug.ops.fp8.reference.quantize_columns`."""
    w = unit_stride(w)
    if out is None:
        out = torch.empty((w.shape[1], w.shape[0]), dtype=FP8, device=w.device)
    check_output("out", out, (w.shape[1], w.shape[0]))
    fp8_quantize_columns(w, scale, out)
    return out


def product(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """See :func:`fastplug.ops.fp8.reference.product`.

    The sum runs in the tensor cores' own accumulator ("fast accumulation"), which on Hopper has fewer mantissa bits
    than fp32: an error well below that of e4m3 itself.
    """
    if a.device.type == "cpu":  # the interpreter
        return reference.product(a, a_scale, b, b_scale, dtype)
    return torch._scaled_mm(
        a, b.t(), scale_a=a_scale[:, None], scale_b=b_scale[None, :], out_dtype=dtype, use_fast_accum=True
    )


def product_add(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    dtype: torch.dtype,
    alpha: float = 1.0,
) -> torch.Tensor | None:
    """See :func:`fastplug.ops.fp8.reference.product_add`."""
    if not share.suits(a, b, left, right, dtype):
        return None
    y = torch.empty(len(a), len(b), dtype=dtype, device=a.device)
    return y if share.attempt(y, a, a_scale, b, b_scale, left, right, alpha) else None
