"""A linear layer over a frozen 4-bit weight, over either implementation of the decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastplug.ops.nf4.reference import Nested
from fastplug.ops.table import table_for


class NF4Linear(torch.autograd.Function):
    """Keeps references to the packed weight and decodes it again in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        implementation: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        code: torch.Tensor,
        blocksize: int,
        shape: tuple[int, int],
        nested: Nested | None,
    ) -> torch.Tensor:
        ctx.implementation, ctx.blocksize, ctx.shape = implementation, blocksize, shape
        ctx.blocksize2 = None if nested is None else nested[3]
        ctx.save_for_backward(packed, absmax, code, *(() if nested is None else nested[:3]))
        weight = torch.empty(shape, dtype=x.dtype, device=x.device)
        implementation.decode(packed, absmax, code, blocksize, weight, nested=nested)
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        packed, absmax, code, *nested = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[1]:
            weight = torch.empty(ctx.shape, dtype=dy.dtype, device=dy.device)
            ctx.implementation.decode(
                packed, absmax, code, ctx.blocksize, weight, nested=(*nested, ctx.blocksize2) if nested else None
            )
            dx = dy @ weight
        if ctx.needs_input_grad[2]:
            dbias = dy.flatten(0, -2).sum(0)
        return None, dx, dbias, *(None,) * 6


def nf4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    shape: tuple[int, int],
    *,
    nested: Nested | None = None,
    bias: torch.Tensor | None = None,
    implementation: Any = None,
) -> torch.Tensor:
    """``x @ weight.T + bias`` for a packed weight of ``shape`` [N, K]; the weight gets no gradient.

    Args:
        x: [..., K] fp16, bf16 or fp32; the weight is decoded to this dtype.
        packed, absmax, code, blocksize, nested: See :func:`fastplug.ops.nf4.reference.decode`.
        bias: [N] in x's dtype, or None.
        implementation: The ``reference`` or ``kernel`` module of this op; by default what the op table holds for the
            device of ``x``.

    Returns:
        [..., N] in x's dtype.
    """
    implementation = implementation or table_for(x.device).nf4
    return NF4Linear.apply(implementation, x, bias, packed, absmax, code, blocksize, shape, nested)
