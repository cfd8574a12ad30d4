"""RMSNorm as one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastplug.ops.rms_norm.autograd import rms_norm
from fastplug.patching.norms import read_norm
from fastplug.patching.sites import Binding, Implementation, NotCovered, Runtime, Site


def forward(module: nn.Module, binding: Binding, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
    hidden_states = args[0] if args else kwargs.get(binding.parameters[0])
    if hidden_states is None or len(args) + len(kwargs) != 1:
        return NotCovered("it is given more than its input")
    found = read_norm(module, binding.family, inside=True)
    if isinstance(found, str):
        return NotCovered(f"norm {found}")
    weight, norm = found
    if hidden_states.dtype != weight.dtype:
        return NotCovered("the weight's dtype is not that of the residual stream")
    if binding.family.norm.kind == "layer":
        return F.layer_norm(hidden_states, weight.shape, weight, None, norm.eps)
    return rms_norm(
        hidden_states, weight, norm.eps, norm.offset, norm.cast_first, implementation=binding.runtime.ops.rms_norm
    )


def refuse(site: Site, runtime: Runtime) -> str | None:
    if _unusual(site.module):
        return None
    found = read_norm(site.module, site.family, inside=True)
    return f"it {found}" if isinstance(found, str) else None


def _unusual(module: nn.Module) -> bool:
    """Whether it scales several heads differently (Cohere's q/k norm), or nothing (Gemma 4's value norm)."""
    weight = getattr(module, "weight", None)
    return weight is None or weight.dim() > 1


def left_alone(site: Site, runtime: Runtime) -> str | None:
    if _unusual(site.module):
        return "it does not have one weight per channel, and is small"
    if site.family.norm.kind == "rms" and runtime.ops.names.get("rms_norm") == "reference":
        return "without a kernel for this device PyTorch's own norm is as fast"
    return None


IMPLEMENTATION = Implementation("norm", "fused norm", forward, refuse, left_alone)
