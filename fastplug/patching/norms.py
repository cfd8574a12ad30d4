"""Read an RMSNorm module: its weight and its parameters."""

from __future__ import annotations

import torch
from torch import nn

from fastplug.families import Family
from fastplug.ops.lora.attention_input import Norm
from fastplug.patching.inspection import intercepted, unwrap_saved


def read_norm(module: nn.Module, family: Family) -> tuple[torch.Tensor, Norm] | str:
    """(weight [width], parameters), or the reason why no fused op covers the module."""
    inner = unwrap_saved(module)
    if isinstance(inner, str):
        return f"has {inner}"
    reason = intercepted(inner)
    if reason is not None:
        return f"has {reason}"
    kind = type(inner)
    if kind.__qualname__ != f"{family.prefix}RMSNorm" or kind.__module__ != family.module:
        return f"is a {kind.__module__}.{kind.__qualname__}"
    weight = inner.weight
    if type(weight) is not nn.Parameter or weight.dim() != 1 or not weight.numel():
        return "has a sharded weight"
    row = family.norm
    return weight, Norm(getattr(inner, row.eps), row.offset, row.cast_first)
