"""Read an RMSNorm module: its weight and its parameters."""

from __future__ import annotations

import torch
from torch import nn

from fastplug.families import Family
from fastplug.ops.lora.attention_input import Norm
from fastplug.patching.inspection import intercepted, unwrap_saved
from fastplug.sharding import SHARDED, own_class, whole


def read_norm(module: nn.Module, family: Family, inside: bool = False) -> tuple[torch.Tensor, Norm] | str:
    """(weight [width], parameters), or the reason why no fused op covers the module.

    ``inside`` tells that this is within a call of the module, so that its hooks have run or will.
    """
    inner = unwrap_saved(module)
    if isinstance(inner, str):
        return f"has {inner}"
    reason = None if inside else intercepted(inner)
    if reason is not None:
        return f"has {reason}"
    kind = own_class(type(inner))
    if not family.plays(inner, "norm"):
        return f"is a {kind.__module__}.{kind.__qualname__}"
    weight = getattr(inner, "weight", None)
    if weight is None:
        return "has no weight"
    if not whole(weight, 1):
        return f"has a weight that {SHARDED}"
    row = family.norm
    if not hasattr(inner, row.eps):
        return f"has no {row.eps}"
    return weight, Norm(getattr(inner, row.eps), row.offset, row.cast_first)
