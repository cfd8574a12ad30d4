"""Weights of which values are missing: either somebody shards them (FSDP, ZeRO-3, TP), or they are damaged."""

from __future__ import annotations

import torch
from torch import nn

from fastplug.quant.codec import Damaged
from fastplug.sharding import SHARDED, distributed, gathers_itself

# What those who split plain tensors leave on a module: FSDP1, and transformers' tensor parallelism.
MARKS = ("_is_fsdp_managed_module", "_is_hooked", "_hf_tp_plan")


def incomplete(linear: nn.Module, what: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> str:
    """Why a weight cannot be read one of whose tensors has not the shape, or the number of values, that it needs.

    Args:
        linear: The module that holds it.
        what: The tensor, as a sentence begins with it.
        tensor: What there is. One without values is taken for a placeholder, whoever put it there.
        expected: The shape that it should have.
    """
    if sharded(linear) or not tensor.numel():
        return f"{what} {SHARDED}"
    return Damaged(f"{what} has shape {tuple(tensor.shape)}, expected {expected}")


def sharded(module: nn.Module) -> bool:
    """Whether somebody shards the module, so that what its tensors hold now need not be all of it."""
    if any(mark in module.__dict__ for mark in MARKS) or gathers_itself(module):
        return True
    tensors = (*module._parameters.values(), *module._buffers.values())
    return any(distributed(tensor) or hasattr(tensor, "ds_id") for tensor in tensors)
