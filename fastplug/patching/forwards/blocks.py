"""What the fast forwards share: reading groups of projections, and when to leave a call alone."""

from __future__ import annotations

import torch
from torch import nn

from fastplug.ops.lora.dora import DoraGroup
from fastplug.ops.lora.group import Group, Projection
from fastplug.patching.inspection import global_hooks, intercepted
from fastplug.patching.projection import compute_dtype, read
from fastplug.patching.sites import Runtime


def read_projections(module: nn.Module, names: tuple[str, ...], runtime: Runtime) -> list[Projection] | str:
    """The named projections of a module, or why one of them is not covered."""
    projections: list[Projection] = []
    for name in names:
        projection = read(getattr(module, name), runtime)
        if isinstance(projection, str):
            return f"{name} {projection}"
        projections.append(projection)
    return projections


def read_group(module: nn.Module, names: tuple[str, ...], x: torch.Tensor, runtime: Runtime) -> Group | str:
    """The named projections as one group, in the dtype in which projections of x are computed."""
    projections = read_projections(module, names, runtime)
    if isinstance(projections, str):
        return projections
    dtype = compute_dtype(x, [getattr(module, name) for name in names], runtime)
    if isinstance(dtype, str):
        return dtype
    if any(p.magnitude is not None for p in projections):
        weights = runtime.weights
        if weights is not None and weights.limit is not None:
            weights = None  # decoding writes no more than scaling a copy of what is kept would
        return DoraGroup(projections, dtype, runtime.ops, weights=weights)
    fp8 = runtime.fp8
    if fp8 is not None and any(p.owner in runtime.exact for p in projections):
        fp8 = None
    return Group(projections, dtype, runtime.ops, fp8, runtime.weights)


def interception(module: nn.Module, parts: tuple[str, ...]) -> str | None:
    """Why running the fused path would skip something attached to the named parts of a module."""
    if global_hooks():
        return "hooks for all modules are registered"
    for part in parts:
        reason = intercepted(getattr(module, part))
        if reason is not None:
            return f"{part} has {reason}"
    return None
