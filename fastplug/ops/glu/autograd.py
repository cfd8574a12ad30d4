"""Gated linear units with gradients, over either implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastplug.ops.table import table_for


class GLU(torch.autograd.Function):
    """Keeps ``gate`` and ``up``; the activation is recomputed."""

    @staticmethod
    def forward(ctx: Any, implementation: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        rows = gate.reshape(-1, gate.shape[-1])
        out = torch.empty(rows.shape, dtype=gate.dtype, device=gate.device)
        implementation.forward(rows, up.reshape(rows.shape), activation, out)
        ctx.save_for_backward(gate, up)
        ctx.implementation, ctx.activation = implementation, activation
        return out.view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        rows = gate.reshape(-1, gate.shape[-1])
        dgate = torch.empty(rows.shape, dtype=gate.dtype, device=gate.device)
        dup = torch.empty(rows.shape, dtype=up.dtype, device=up.device)
        ctx.implementation.backward(dout.reshape(rows.shape), rows, up.reshape(rows.shape), ctx.activation, dgate, dup)
        return None, dgate.view(gate.shape), dup.view(up.shape), None


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu", *, implementation: Any = None) -> torch.Tensor:
    """``activation(gate) * up`` of equally shaped ``gate`` and ``up`` [..., N], in gate's dtype.

    Args:
        activation: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.
        implementation: The ``reference`` or ``kernel`` module of this op; by default what the op table holds for the
            device of ``gate``.
    """
    return GLU.apply(implementation or table_for(gate.device).glu, gate, up, activation)
