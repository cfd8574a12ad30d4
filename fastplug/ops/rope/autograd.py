"""Rotary position embedding with gradients, over either implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastplug.ops.table import table_for


class RoPE(torch.autograd.Function):
    """Keeps cos and sin, and q and k only where their heads are normalized."""

    @staticmethod
    def forward(
        ctx: Any,
        implementation: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        implementation.forward(q, k, cos, sin, q_out, k_out, q_weight=q_weight, k_weight=k_weight, **options)
        saved = (None if q_weight is None else q, None if k_weight is None else k)
        ctx.save_for_backward(cos, sin, q_weight, k_weight, *saved)
        ctx.implementation, ctx.options = implementation, options
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> Any:
        cos, sin, q_weight, k_weight, q, k = ctx.saved_tensors
        dq_out = torch.empty(dq.shape, dtype=dq.dtype, device=dq.device)
        dk_out = torch.empty(dk.shape, dtype=dk.dtype, device=dk.device)
        dq_weight, dk_weight = ctx.implementation.backward(
            dq, dk, cos, sin, dq_out, dk_out, q=q, k=k, q_weight=q_weight, k_weight=k_weight,
            weight_grad=ctx.needs_input_grad[5] or ctx.needs_input_grad[6], **ctx.options,
        )  # fmt: skip
        return None, dq_out, dk_out, None, None, dq_weight, dk_weight, None


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    cast_first: bool = True,
    implementation: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``q`` [B, S, Hq, D] and ``k`` [B, S, Hk, D], each head normalized if it has a weight, turned by its position.

    Args:
        q, k, cos, sin, interleaved, q_weight, k_weight, eps, offset, cast_first: See
            :func:`fastplug.ops.rope.reference.forward`. cos and sin get no gradient.
        implementation: The ``reference`` or ``kernel`` module of this op; by default what the op table holds for the
            device of ``q``.

    Returns:
        New tensors shaped as ``q`` and ``k``.
    """
    options = {"interleaved": interleaved, "eps": eps, "offset": offset, "cast_first": cast_first}
    implementation = implementation or table_for(q.device).rope
    return RoPE.apply(implementation, q, k, cos, sin, q_weight, k_weight, options)
