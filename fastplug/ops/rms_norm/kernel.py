"""RMSNorm in Triton: one read and one write of each tensor. The functions are those of ``reference``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastplug.ops.ahead import launched
from fastplug.ops.configs import config
from fastplug.ops.launch import check_output, on_device, persistent_programs, power_of_2, stride_unit, unit_stride
from fastplug.ops.library import custom_op


@triton.jit(do_not_specialize=["x_stride", "residual_stride", "y_stride", "h_stride", "M"])
def _forward_kernel(
    x_ptr,  # [M, N]
    residual_ptr,  # [M, N] or None
    weight_ptr,  # [N] or None
    y_ptr,  # [M, N]
    h_ptr,  # [M, N], written only with a residual, else None
    rstd_ptr,  # [M] fp32
    x_stride,  # row strides in units of UNIT elements
    residual_stride,
    y_stride,
    h_stride,
    M,
    N,
    eps,
    offset,
    CAST_FIRST: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_N)[None, :]
    row_mask = rows < M
    mask = row_mask[:, None] & (cols < N)
    row = rows.to(tl.int64)[:, None]
    h = tl.load(x_ptr + row * (x_stride * UNIT) + cols, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        h += tl.load(residual_ptr + row * (residual_stride * UNIT) + cols, mask=mask, other=0.0).to(tl.float32)
        rounded = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * (h_stride * UNIT) + cols, rounded, mask=mask)
        h = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(h * h, axis=1) / N + eps)
    tl.store(rstd_ptr + rows, rstd, mask=row_mask)
    y = h * rstd[:, None]
    if CAST_FIRST:
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
    if weight_ptr is not None:
        y *= offset + tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * (y_stride * UNIT) + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["dy_stride", "h_stride", "dh_stride", "dx_stride", "M"])
def _backward_kernel(
    dy_ptr,  # [M, N]
    h_ptr,  # [M, N]
    rstd_ptr,  # [M] fp32
    weight_ptr,  # [N] or None
    dh_ptr,  # [M, N] or None
    dx_ptr,  # [M, N]
    partial_ptr,  # [programs, N] fp32 or None: each program's share of dweight
    dy_stride,  # row strides in units of UNIT elements
    h_stride,
    dh_stride,
    dx_stride,
    M,
    N,
    offset,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)[None, :]
    col_mask = cols < N
    if partial_ptr is not None:
        dweight = tl.zeros((ROWS, BLOCK_N), tl.float32)
    tile = program  # a while loop: Triton 3.6 cannot interpret a range over tensors with numpy 2.4
    while tile * ROWS < M:
        rows = tile * ROWS + tl.arange(0, ROWS)
        row_mask = rows < M
        mask = row_mask[:, None] & col_mask
        row = rows.to(tl.int64)[:, None]
        g = tl.load(dy_ptr + row * (dy_stride * UNIT) + cols, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + row * (h_stride * UNIT) + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)[:, None]
        normed = h * rstd
        if partial_ptr is not None:
            dweight += g * normed
        if weight_ptr is not None:
            g *= offset + tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
        dx = rstd * (g - normed * (tl.sum(g * normed, axis=1) / N)[:, None])
        if dh_ptr is not None:
            dx += tl.load(dh_ptr + row * (dh_stride * UNIT) + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * (dx_stride * UNIT) + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        tile += tl.num_programs(0)
    if partial_ptr is not None:
        share = tl.sum(dweight, axis=0)[None, :]
        tl.store(partial_ptr + program.to(tl.int64) * N + cols, share, mask=col_mask)


def tile(N: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int, int]:
    """``(rows, columns, warps)`` of one program: whole rows, 2048 elements at least."""
    block = power_of_2(N)
    rows = max(1, 2048 // block)
    return rows, block, min(32, max(4, rows * block // config(device).per_warp(dtype.itemsize)))


@custom_op("y", "h", "rstd")
def rms_norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    y: torch.Tensor,
    h: torch.Tensor | None,
    rstd: torch.Tensor,
    eps: float,
    offset: float,
    cast_first: bool,
) -> None:
    """Write ``y`` [M, N], ``rstd`` [M] and, given a residual, ``h`` [M, N]. Last dimensions are contiguous."""
    M, N = x.shape
    if x.numel() == 0:
        return
    strides = [t.stride(0) if t is not None else 0 for t in (x, residual, y, h)]
    unit = stride_unit(*strides)
    rows, block, warps = tile(N, x.dtype, x.device)
    with on_device(x):
        launched(_forward_kernel, (triton.cdiv(M, rows),))(
            x, residual, weight, y, h, rstd, *(s // unit for s in strides), M, N, eps, offset,
            CAST_FIRST=cast_first, UNIT=unit, ROWS=rows, BLOCK_N=block, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip


@custom_op("dx", "partial")
def rms_norm_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    dh: torch.Tensor | None,
    dx: torch.Tensor,
    partial: torch.Tensor | None,
    offset: float,
) -> None:
    """Write ``dx`` [M, N] and, where given, ``partial`` [programs, N] fp32, whose sum over programs is ``dweight``."""
    M, N = h.shape
    if h.numel() == 0:
        return
    strides = [t.stride(0) if t is not None else 0 for t in (dy, h, dh, dx)]
    unit = stride_unit(*strides)
    rows, block, warps = tile(N, h.dtype, h.device)
    programs = triton.cdiv(M, rows) if partial is None else partial.shape[0]
    with on_device(h):
        launched(_backward_kernel, (programs,))(
            dy, h, rstd, weight, dh, dx, partial, *(s // unit for s in strides), M, N, offset,
            UNIT=unit, ROWS=rows, BLOCK_N=block, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
    cast_first: bool = True,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`fastplug.ops.rms_norm.reference.forward`."""
    x = unit_stride(x)
    if out is None:
        out = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)
    else:
        check_output("out", out, x.shape)
    h = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual = None if residual is None else unit_stride(residual)
    weight = None if weight is None else weight.contiguous()
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    rms_norm_forward(x, residual, weight, out, h, rstd, eps, offset, cast_first)
    return out, x if h is None else h, rstd


def backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    offset: float = 0.0,
    cast_first: bool = True,
    dh: torch.Tensor | None = None,
    weight_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :func:`fastplug.ops.rms_norm.reference.backward`. ``dweight`` is deterministic: partial sums, no atomics."""
    M, N = h.shape
    dy, h = unit_stride(dy), unit_stride(h)
    dh = None if dh is None else unit_stride(dh)
    weight = None if weight is None else weight.contiguous()
    dx = torch.empty((M, N), dtype=h.dtype, device=h.device)
    partial = None
    if weight_grad and weight is not None:
        if M == 0:
            return dx, torch.zeros_like(weight)
        programs = persistent_programs(h.device, triton.cdiv(M, tile(N, h.dtype, h.device)[0]))
        partial = torch.empty((programs, N), dtype=torch.float32, device=h.device)
    rms_norm_backward(dy, h, rstd, weight, dh, dx, partial, offset)
    if partial is None or weight is None:
        return dx, None
    return dx, partial.sum(0).to(weight.dtype)
