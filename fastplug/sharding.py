"""What fastplug has to know of weights that their owner (FSDP, ZeRO-3) splits over processes and gathers at a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# How a reason ends that holds only until the weight's owner gathers it.
SHARDED = "is sharded and not gathered now"
TORCH = "torch.distributed."


def own_class(kind: type) -> type:
    """The class beneath those that PyTorch's FSDP2 puts on top of the classes of the modules it shards."""
    return next(cls for cls in kind.__mro__ if not cls.__module__.startswith(TORCH))


def whole(weight: Any, dims: int) -> bool:
    """Whether a dense weight is there as a whole; FSDP1 puts tensors in the place of parameters during a call."""
    return type(weight) in (nn.Parameter, torch.Tensor) and weight.dim() == dims and weight.numel() > 0


def distributed(weight: Any) -> bool:
    """Whether a weight is a DTensor."""
    return hasattr(weight, "device_mesh")


def gathers_itself(module: nn.Module) -> bool:
    """Whether calling the module gathers its weights: FSDP2's hooks are on it."""
    return type(module).__module__.startswith(TORCH) and own_class(type(module)) is not type(module)


def call_within(module: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    """``module(*inputs)`` with all its hooks, but with ``function`` in the place of its forward, for this call."""
    module.__dict__["forward"] = function
    try:
        return module(*inputs)
    finally:
        del module.__dict__["forward"]


class Anchor(torch.autograd.Function):
    """``(loss, 0)`` such that the gradient of the zero is asked for before that of the loss goes on.

    FSDP2's hooks see what a module returns: they cast it and gather the weights again when its gradient arrives. The
    zero goes through them, the loss keeps its precision.
    """

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return loss.clone(), loss.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return gradient
