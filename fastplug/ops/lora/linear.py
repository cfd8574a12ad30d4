"""One projection with its adapter."""

from __future__ import annotations

from typing import Any

import torch

from fastplug.ops.lora.group import Group, Kept
from fastplug.ops.recompute import graph_goes


def lora_linear(group: Group, x: torch.Tensor) -> torch.Tensor:
    """The projection of a group of one, for x [..., in_features]; returns [..., out_features] in the group's dtype.

    The backward keeps x as it was given, which for an output projection is what attention keeps anyway.
    """
    out: torch.Tensor = LoRALinear.apply(group, x, *group.tensors())
    return out


class LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, x: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
        rows = x.reshape(-1, group.in_features).to(group.dtype)
        out, kept = group.forward(rows)
        ctx.save_for_backward(x, *kept.tensors())
        ctx.group, ctx.hands_on = group, group.may_hand_on(x.numel())
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], group.out_features))  # no view: callers add in place

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[Any, ...]:
        group: Group = ctx.group
        x, *kept = ctx.saved_tensors
        kept = Kept.of(kept)
        needs_dx, needs = ctx.needs_input_grad[1], ctx.needs_input_grad[2:]
        rows = x.reshape(-1, group.in_features).to(group.dtype)
        g = g.reshape(-1, group.out_features).to(group.dtype)
        dx, found = group.input_gradient(g, kept, needs_dx, needs, ctx.hands_on and graph_goes())
        grads = group.parameter_gradients(g, found, rows, kept, needs)
        return None, None if dx is None else dx.view(x.shape).to(x.dtype), *grads
