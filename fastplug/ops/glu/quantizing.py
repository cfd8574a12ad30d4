"""Gated linear units whose results are wanted in FP8 too, by row: what was written is read back from the cache.

A program makes a row: it writes the values and finds the largest of them, then reads them again for e4m3. The rows in
work on all of a GPU lie in its L2 cache. The functions are those of ``reference``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastplug.ops.fp8.kernel import rounded, row_scale
from fastplug.ops.fp8.reference import FP8, LARGEST
from fastplug.ops.glu.kernel import activated, gradients
from fastplug.ops.glu.reference import check_activation
from fastplug.ops.launch import check_output, on_device, power_of_2, stride_unit, unit_stride
from fastplug.ops.library import custom_op

BLOCK, WARPS = 4096, 16  # 8 elements of each tensor a thread


@triton.jit(do_not_specialize=["gate_stride", "up_stride", "out_stride"])
def _forward_kernel(
    gate_ptr,  # [M, N]
    up_ptr,  # [M, N]
    out_ptr,  # [M, N]
    q_ptr,  # [M, N] e4m3, contiguous
    scale_ptr,  # [M] fp32
    gate_stride,  # row strides in units of UNIT elements
    up_stride,
    out_stride,
    N: tl.constexpr,
    LARGEST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    gate_ptr += row * (gate_stride * UNIT)
    up_ptr += row * (up_stride * UNIT)
    out_ptr += row * (out_stride * UNIT)
    q_ptr += row * N
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        g = tl.load(gate_ptr + cols, mask=cols < N, other=0.0, eviction_policy="evict_first").to(tl.float32)
        u = tl.load(up_ptr + cols, mask=cols < N, other=0.0, eviction_policy="evict_first").to(tl.float32)
        out = activated(g, u, gate_ptr.dtype.element_ty, ACTIVATION).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + cols, out, mask=cols < N)
        largest = tl.maximum(largest, tl.abs(out.to(tl.float32)))
    scale = row_scale(tl.max(largest, axis=0), LARGEST)
    tl.store(scale_ptr + row, scale)
    inverse = 1.0 / scale
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        out = tl.load(out_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        tl.store(q_ptr + cols, rounded(out, inverse, q_ptr.dtype.element_ty, LARGEST), mask=cols < N)


@triton.jit(do_not_specialize=["dout_stride", "gate_stride", "up_stride", "dgate_up_stride", "out_stride"])
def _backward_kernel(
    dout_ptr,  # [M, N]
    gate_ptr,  # [M, N]
    up_ptr,  # [M, N]
    dgate_up_ptr,  # [M, 2 N]
    out_ptr,  # [M, N] or None
    q_ptr,  # [M, 2 N] e4m3, contiguous
    scale_ptr,  # [M] fp32
    dout_stride,  # row strides in units of UNIT elements
    gate_stride,
    up_stride,
    dgate_up_stride,
    out_stride,
    N: tl.constexpr,
    LARGEST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dout_ptr += row * (dout_stride * UNIT)
    gate_ptr += row * (gate_stride * UNIT)
    up_ptr += row * (up_stride * UNIT)
    dgate_ptr = dgate_up_ptr + row * (dgate_up_stride * UNIT)
    dup_ptr = dgate_ptr + N
    q_ptr += row * (2 * N)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < N
        d = tl.load(dout_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        g = tl.load(gate_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        u = tl.load(up_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        dgate, dup, out = gradients(d, g, u, gate_ptr.dtype.element_ty, ACTIVATION)
        dgate, dup = dgate.to(dgate_ptr.dtype.element_ty), dup.to(dgate_ptr.dtype.element_ty)
        tl.store(dgate_ptr + cols, dgate, mask=mask)
        tl.store(dup_ptr + cols, dup, mask=mask)
        if out_ptr is not None:
            out_row = out_ptr + row * (out_stride * UNIT)
            tl.store(out_row + cols, out.to(out_ptr.dtype.element_ty), mask=mask)
        largest = tl.maximum(largest, tl.maximum(tl.abs(dgate.to(tl.float32)), tl.abs(dup.to(tl.float32))))
    scale = row_scale(tl.max(largest, axis=0), LARGEST)
    tl.store(scale_ptr + row, scale)
    inverse = 1.0 / scale
    for start in range(0, N, BLOCK):  # what has been written before the maximum's barrier
        cols = start + tl.arange(0, BLOCK)
        dgate = tl.load(dgate_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        dup = tl.load(dup_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        tl.store(q_ptr + cols, rounded(dgate, inverse, q_ptr.dtype.element_ty, LARGEST), mask=cols < N)
        tl.store(q_ptr + N + cols, rounded(dup, inverse, q_ptr.dtype.element_ty, LARGEST), mask=cols < N)


@custom_op("out", "q", "scale")
def glu_forward_quantized(
    gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, activation: str
) -> None:
    """Write ``out``, ``q`` [M, N] and ``scale`` [M]; all but the scales have contiguous last dimensions."""
    M, N = gate.shape
    if gate.numel() == 0:
        return
    strides = gate.stride(0), up.stride(0), out.stride(0)
    unit = stride_unit(*strides)
    with on_device(gate):
        _forward_kernel[(M,)](
            gate, up, out, q, scale, *(stride // unit for stride in strides), N, LARGEST, activation, unit,
            min(BLOCK, power_of_2(N)), num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip


@custom_op("dgate_up", "out", "q", "scale")
def glu_backward_quantized(
    dout: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate_up: torch.Tensor,
    out: torch.Tensor | None,
    q: torch.Tensor,
    scale: torch.Tensor,
    activation: str,
) -> None:
    """Write ``dgate_up`` and ``q`` [M, 2 N], ``scale`` [M] and, where given, ``out`` [M, N]."""
    M, N = gate.shape
    if gate.numel() == 0:
        return
    strides = dout.stride(0), gate.stride(0), up.stride(0), dgate_up.stride(0), 0 if out is None else out.stride(0)
    unit = stride_unit(*strides)
    with on_device(gate):
        _backward_kernel[(M,)](
            dout, gate, up, dgate_up, out, q, scale, *(stride // unit for stride in strides), N, LARGEST, activation,
            unit, min(BLOCK, power_of_2(N)), num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def forward_quantized(
    gate: torch.Tensor, up: torch.Tensor, activation: str, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`fastplug.ops.glu.reference.forward_quantized`."""
    check_activation(activation)
    check_output("out", out, gate.shape)
    q = torch.empty(gate.shape, dtype=FP8, device=gate.device)
    scale = torch.empty(len(gate), dtype=torch.float32, device=gate.device)
    glu_forward_quantized(unit_stride(gate), unit_stride(up), out, q, scale, activation)
    return q, scale


def backward_quantized(
    dout: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    dgate_up: torch.Tensor,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`fastplug.ops.glu.reference.backward_quantized`."""
    check_activation(activation)
    M, N = gate.shape
    check_output("dgate_up", dgate_up, (M, 2 * N))
    if out is not None:
        check_output("out", out, gate.shape)
    q = torch.empty((M, 2 * N), dtype=FP8, device=gate.device)
    scale = torch.empty(M, dtype=torch.float32, device=gate.device)
    args = unit_stride(dout), unit_stride(gate), unit_stride(up), dgate_up, out, q, scale, activation
    glu_backward_quantized(*args)
    return q, scale
