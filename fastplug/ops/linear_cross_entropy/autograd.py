"""Saved tensors and backward of the scalar loss.

The loss is ``-Σ logprob / items``, so every row has the same upstream gradient, and one pass over the vocabulary gives
the loss and the gradients of ``-Σ logprob`` with respect to hidden, weight and bias. Backward multiplies them by
``grad_loss / items``: not before, where in fp16 a gradient divided by thousands of tokens would vanish before the
loss scale reaches it. The gradient of the weight, as large as the weight, is multiplied in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastplug.ops.logprobs import chunked
from fastplug.ops.logprobs.autograd import scale_rows
from fastplug.ops.logprobs.chunked import Needs, Settings

Items = Tensor | float


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        items: Items,
        settings: Settings,
        dtype: torch.dtype,
        needs: Needs,
        counted: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rows, gradients = chunked.forward(hidden, weight, bias, targets, settings, dtype, needs, counted)
        on_device = isinstance(items, Tensor)
        ctx.save_for_backward(*gradients, items if on_device else None)
        ctx.items = None if on_device else items
        ctx.weight_is_spent = False
        ctx.hidden_dtype = hidden.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(*(tensor for tensor in (rows.argmax, rows.entropy) if tensor is not None))
        ctx.set_materialize_grads(False)
        return loss(rows.logprob, items), rows.argmax, rows.entropy

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_loss is None:
            return (None,) * 9
        if ctx.weight_is_spent:
            raise RuntimeError(
                "linear_cross_entropy of a trained head can go backward once: its first backward turned the one "
                "buffer of [V, H] into the weight's gradient. For a second pass over the same graph use "
                "reduction='none', whose backward computes the logits again"
            )
        hidden, weight, bias, items = ctx.saved_tensors
        if items is None:
            factor = grad_loss / ctx.items if ctx.items else torch.zeros_like(grad_loss)
        else:  # no item, no gradient: the loss is 0 / 0, but PyTorch's gradient is 0
            factor = (grad_loss / items).masked_fill(items == 0, 0)
        factor = factor.reshape(1, 1)
        if weight is not None:
            ctx.weight_is_spent = True
            scale_in_place(weight, factor)
        return (
            None if hidden is None else scale_rows(hidden, factor, ctx.hidden_dtype),
            weight,
            None if bias is None else scale_rows(bias, factor.view(1), ctx.bias_dtype),
            *(None,) * 6,
        )


def scale_in_place(gradient: Tensor, factor: Tensor) -> None:
    """Multiply [V, H] by ``factor`` [1, 1]; a CPU makes fp32 copies of 16-bit operands, so it goes by parts."""
    parts = gradient.split(chunked.WEIGHT_ROWS) if gradient.device.type == "cpu" else (gradient,)
    for part in parts:
        part.mul_(factor)


def loss(logprob: Tensor, items: Items) -> Tensor:
    """``-Σ logprob / items``, 0-dimensional."""
    return logprob.sum().neg() / items
