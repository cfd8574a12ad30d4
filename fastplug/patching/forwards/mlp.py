"""A gated MLP: ``plan`` serves the decoder layer, with its norm and residual adds; ``forward`` an MLP on its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastplug.families import Family
from fastplug.ops.lora.attention_input import Norm
from fastplug.ops.lora.gated_mlp import GatedMLP, gated_mlp
from fastplug.patching.forwards.blocks import interception, read_group, read_projections
from fastplug.patching.sites import Binding, Implementation, NotCovered, Runtime, Site

ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}


def plan(mlp: nn.Module, family: Family, runtime: Runtime, x: torch.Tensor, norm: Norm | None) -> GatedMLP | str:
    """Read the module's present state, or say why the fused path does not cover it."""
    activation = type(getattr(mlp, family.activation)).__name__
    if activation not in ACTIVATIONS:
        return f"the activation {activation} has no kernel"
    gate_up = read_group(mlp, (family.gate, family.up), x, runtime)
    if isinstance(gate_up, str):
        return gate_up
    down = read_group(mlp, (family.down,), x, runtime)
    if isinstance(down, str):
        return down
    if down.dtype != gate_up.dtype:
        return f"{family.down} computes in {down.dtype}, {family.gate} in {gate_up.dtype}"
    return GatedMLP(gate_up, down, ACTIVATIONS[activation], norm)


def forward(module: nn.Module, binding: Binding, x: torch.Tensor) -> Any:
    planned = interception(module, (binding.family.activation,)) or plan(
        module, binding.family, binding.runtime, x, None
    )
    return NotCovered(planned) if isinstance(planned, str) else gated_mlp(planned, x)


def refuse(site: Site, runtime: Runtime) -> str | None:
    family = site.family
    activation = type(getattr(site.module, family.activation)).__name__
    if activation not in ACTIVATIONS:
        return f"the activation {activation} has no kernel"
    found = read_projections(site.module, (family.gate, family.up, family.down), runtime)
    return found if isinstance(found, str) else None


IMPLEMENTATION = Implementation("mlp", "fused gated MLP", forward, refuse)
