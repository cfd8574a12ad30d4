"""RMSNorm with gradients, over either implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastplug.ops.table import table_for


class RMSNorm(torch.autograd.Function):
    """Keeps ``h`` and one fp32 number a row; the normalized value is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        implementation: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
        offset: float,
        cast_first: bool,
    ) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        added = None if residual is None else residual.reshape(rows.shape)
        y, h, rstd = implementation.forward(rows, weight, eps, residual=added, offset=offset, cast_first=cast_first)
        ctx.save_for_backward(h, rstd, weight)
        ctx.implementation, ctx.offset, ctx.cast_first = implementation, offset, cast_first
        ctx.shape, ctx.residual_dtype = x.shape, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        y = torch.ops.aten._unsafe_view(y, x.shape)  # not a view: the caller may write into it
        return y if residual is None else (y, h.view(x.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor | None, dh: torch.Tensor | None = None) -> Any:
        h, rstd, weight = ctx.saved_tensors
        dweight = None
        if dy is None:
            dx = dh
        else:
            dx, dweight = ctx.implementation.backward(
                dy.reshape(h.shape), h, rstd, weight, offset=ctx.offset, cast_first=ctx.cast_first,
                dh=None if dh is None else dh.reshape(h.shape), weight_grad=ctx.needs_input_grad[3],
            )  # fmt: skip
            dx = dx.view(ctx.shape)
        dresidual = None if dx is None or ctx.residual_dtype is None else dx.to(ctx.residual_dtype)
        return None, dx, dresidual, dweight, None, None, None


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
    residual: torch.Tensor | None = None,
    *,
    implementation: Any = None,
) -> Any:
    """RMSNorm of ``x`` or, given a residual, of ``h = x + residual``, over the last dimension.

    Args:
        x: [..., N], any float dtype.
        weight: [N] or None.
        eps, offset, cast_first: See :func:`fastplug.ops.rms_norm.reference.forward`.
        residual: [..., N], or None.
        implementation: The ``reference`` or ``kernel`` module of this op; by default what the op table holds for the
            device of ``x``.

    Returns:
        ``y`` [..., N] in x's dtype; ``(y, h)`` given a residual.
    """
    implementation = implementation or table_for(x.device).rms_norm
    return RMSNorm.apply(implementation, x, residual, weight, eps, offset, cast_first)
