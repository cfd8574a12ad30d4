"""Gated linear units in Triton: one pass forward, one pass backward. The functions are those of ``reference``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastplug.ops.ahead import launched
from fastplug.ops.configs import config
from fastplug.ops.glu.reference import check_activation
from fastplug.ops.launch import check_output, on_device, power_of_2, stride_unit, unit_stride
from fastplug.ops.library import custom_op


@triton.jit
def _factor(g, ACTIVATION: tl.constexpr):
    """The activation is ``g * factor``."""
    if ACTIVATION == "silu":
        factor = tl.sigmoid(g)
    elif ACTIVATION == "gelu":
        factor = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
    else:  # 0.5 (1 + tanh(z)) is sigmoid(2 z); saturated long before |g| reaches 32, so c^3 cannot overflow
        c = tl.minimum(tl.maximum(g, -32.0), 32.0)
        factor = tl.sigmoid(1.5957691216057308 * (c + 0.044715 * c * c * c))
    return factor


@triton.jit
def _slope(g, factor, ACTIVATION: tl.constexpr):
    """The activation's derivative."""
    if ACTIVATION == "silu":
        slope = factor * (1.0 + g * tl.sigmoid(-g))  # not 1 - factor, which cancels
    elif ACTIVATION == "gelu":
        slope = factor + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
    else:
        c = tl.minimum(tl.maximum(g, -32.0), 32.0)
        rest = tl.sigmoid(-1.5957691216057308 * (c + 0.044715 * c * c * c))  # not 1 - factor, which cancels
        slope = factor + c * factor * rest * 1.5957691216057308 * (1.0 + 0.134145 * c * c)
    return slope


@triton.jit
def _tile(M, N, COLUMN_BLOCKS, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    program = tl.program_id(0)
    rows = (program // COLUMN_BLOCKS).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (program % COLUMN_BLOCKS).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return rows, cols, (rows < M) & (cols < N)


@triton.jit(do_not_specialize=["gate_stride", "up_stride", "out_stride", "M", "COLUMN_BLOCKS"])
def _forward_kernel(
    gate_ptr,  # [M, N]
    up_ptr,  # [M, N]
    out_ptr,  # [M, N]
    gate_stride,  # row strides in units of UNIT elements
    up_stride,
    out_stride,
    M,
    N,
    COLUMN_BLOCKS,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows, cols, mask = _tile(M, N, COLUMN_BLOCKS, ROWS, BLOCK_N)
    g = tl.load(gate_ptr + rows * (gate_stride * UNIT) + cols, mask=mask).to(tl.float32)
    u = tl.load(up_ptr + rows * (up_stride * UNIT) + cols, mask=mask).to(tl.float32)
    out = (g * _factor(g, ACTIVATION)).to(gate_ptr.dtype.element_ty).to(tl.float32) * u
    tl.store(out_ptr + rows * (out_stride * UNIT) + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "dout_stride", "gate_stride", "up_stride", "dgate_stride", "dup_stride", "out_stride", "M", "COLUMN_BLOCKS",
    ]
)  # fmt: skip
def _backward_kernel(
    dout_ptr,  # [M, N]
    gate_ptr,  # [M, N]
    up_ptr,  # [M, N]
    dgate_ptr,  # [M, N]
    dup_ptr,  # [M, N]
    out_ptr,  # [M, N] or None
    dout_stride,  # row strides in units of UNIT elements
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    out_stride,
    M,
    N,
    COLUMN_BLOCKS,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows, cols, mask = _tile(M, N, COLUMN_BLOCKS, ROWS, BLOCK_N)
    d = tl.load(dout_ptr + rows * (dout_stride * UNIT) + cols, mask=mask).to(tl.float32)
    g = tl.load(gate_ptr + rows * (gate_stride * UNIT) + cols, mask=mask).to(tl.float32)
    u = tl.load(up_ptr + rows * (up_stride * UNIT) + cols, mask=mask).to(tl.float32)
    factor = _factor(g, ACTIVATION)
    slope = _slope(g, factor, ACTIVATION)
    value = g * factor
    dgate = (d * u * slope).to(dgate_ptr.dtype.element_ty)
    tl.store(dgate_ptr + rows * (dgate_stride * UNIT) + cols, dgate, mask=mask)
    tl.store(dup_ptr + rows * (dup_stride * UNIT) + cols, (d * value).to(dup_ptr.dtype.element_ty), mask=mask)
    if out_ptr is not None:
        out = value.to(gate_ptr.dtype.element_ty).to(tl.float32) * u
        tl.store(out_ptr + rows * (out_stride * UNIT) + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


def tile(N: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """``(rows, columns)`` of one program of four warps."""
    elements = 4 * config(device).per_warp(dtype.itemsize)
    block = min(elements, power_of_2(N))
    return elements // block, block


def _geometry(*tensors: torch.Tensor | None) -> tuple[int, int, list[int], int]:
    """``(M, N, row strides, unit)``; tensors that are all contiguous are one long row, without partial tiles."""
    present = [t for t in tensors if t is not None]
    M, N = present[0].shape
    if all(t.is_contiguous() for t in present):
        return 1, M * N, [0] * len(tensors), 8
    strides = [0 if t is None else t.stride(0) for t in tensors]
    unit = stride_unit(*strides)
    return M, N, [stride // unit for stride in strides], unit


@custom_op("out")
def glu_forward(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, activation: str) -> None:
    """Write ``activation(gate) * up`` into ``out``; all [M, N] with contiguous last dimensions."""
    if gate.numel() == 0:
        return
    M, N, strides, unit = _geometry(gate, up, out)
    rows, block = tile(N, gate.dtype, gate.device)
    column_blocks = triton.cdiv(N, block)
    with on_device(gate):
        launched(_forward_kernel, (triton.cdiv(M, rows) * column_blocks,))(
            gate, up, out, *strides, M, N, column_blocks,
            ACTIVATION=activation, UNIT=unit, ROWS=rows, BLOCK_N=block, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


@custom_op("dgate", "dup", "out")
def glu_backward(
    dout: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    out: torch.Tensor | None,
    activation: str,
) -> None:
    """Write ``dgate``, ``dup`` and, where given, ``out``; all [M, N] with contiguous last dimensions."""
    if gate.numel() == 0:
        return
    M, N, strides, unit = _geometry(dout, gate, up, dgate, dup, out)
    rows, block = tile(N, gate.dtype, gate.device)
    column_blocks = triton.cdiv(N, block)
    with on_device(gate):
        launched(_backward_kernel, (triton.cdiv(M, rows) * column_blocks,))(
            dout, gate, up, dgate, dup, out, *strides, M, N, column_blocks,
            ACTIVATION=activation, UNIT=unit, ROWS=rows, BLOCK_N=block, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str, out: torch.Tensor) -> None:
    """See :func:`fastplug.ops.glu.reference.forward`."""
    check_activation(activation)
    check_output("out", out, gate.shape)
    glu_forward(unit_stride(gate), unit_stride(up), out, activation)


def backward(
    dout: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    out: torch.Tensor | None = None,
) -> None:
    """See :func:`fastplug.ops.glu.reference.backward`."""
    check_activation(activation)
    check_output("dgate", dgate, gate.shape)
    check_output("dup", dup, gate.shape)
    if out is not None:
        check_output("out", out, gate.shape)
    glu_backward(unit_stride(dout), unit_stride(gate), unit_stride(up), dgate, dup, out, activation)
