"""A gated MLP: ``plan`` serves the decoder layer, with its norm and residual adds; ``forward`` an MLP on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastplug.families import Family
from fastplug.ops.lora.attention_input import Norm
from fastplug.ops.lora.dora import DoraGroup
from fastplug.ops.lora.gated_mlp import GatedMLP, gated_mlp
from fastplug.ops.lora.group import Group
from fastplug.ops.lora.linear import lora_linear
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


@dataclass(frozen=True)
class PlainMLP:
    """An MLP that is not gated, as it is at this call."""

    up: Group
    activation: nn.Module
    down: Group
    dropout: float = 0.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = lora_linear(self.down, self.activation(lora_linear(self.up, x)))
        return F.dropout(out, self.dropout) if self.dropout else out


def plan(mlp: nn.Module, family: Family, runtime: Runtime, x: torch.Tensor, norm: Norm | None) -> GatedMLP | str:
    """Read the module's present state, or say why the fused path does not cover it."""
    activation = type(getattr(mlp, family.activation)).__name__
    if activation not in ACTIVATIONS:
        return f"the activation {activation} has no kernel"
    gate_up = read_group(mlp, family.gate_up, x, runtime)
    if isinstance(gate_up, str):
        return gate_up
    down = read_group(mlp, (family.down,), x, runtime)
    if isinstance(down, str):
        return down
    if down.dtype != gate_up.dtype:
        return f"{family.down} computes in {down.dtype}, {family.gate} in {gate_up.dtype}"
    gate_up.output_known = isinstance(gate_up, DoraGroup)  # the node keeps gate and up
    once = runtime.options.memory is None and gate_up.decodes_each_time()  # a plan counts on what is needed without
    return GatedMLP(gate_up, down, ACTIVATIONS[activation], norm, decodes_once=once)


def plan_plain(mlp: nn.Module, family: Family, runtime: Runtime, x: torch.Tensor) -> PlainMLP | str:
    """Likewise for a family whose MLP is not gated."""
    up = read_group(mlp, family.gate_up, x, runtime)
    if isinstance(up, str):
        return up
    down = read_group(mlp, (family.down,), x, runtime)
    if isinstance(down, str):
        return down
    return PlainMLP(up, getattr(mlp, family.activation), down, output_dropout(mlp, family))


def output_dropout(mlp: nn.Module, family: Family) -> float:
    """With which probability the module drops its output at this call."""
    return getattr(mlp, family.output_dropout) if family.output_dropout is not None and mlp.training else 0.0


def forward(module: nn.Module, binding: Binding, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
    x = args[0] if args else kwargs.get(binding.parameters[0])
    if x is None or len(args) + len(kwargs) != 1:
        return NotCovered("it is given more than its input")
    family, runtime = binding.family, binding.runtime
    if family.gate is None:
        plain = interception(module, ()) or plan_plain(module, family, runtime, x)
        return NotCovered(plain) if isinstance(plain, str) else plain(x)
    planned = interception(module, (family.activation,)) or plan(module, family, runtime, x, None)
    if isinstance(planned, str):
        return NotCovered(planned)
    out, dropout = gated_mlp(planned, x), output_dropout(module, family)
    return F.dropout(out, dropout) if dropout else out


def refuse(site: Site, runtime: Runtime) -> str | None:
    family = site.family
    activation = type(getattr(site.module, family.activation)).__name__
    if activation not in ACTIVATIONS and family.gate is not None:
        return f"the activation {activation} has no kernel"
    found = read_projections(site.module, (*family.gate_up, family.down), runtime)
    return found if isinstance(found, str) else None


IMPLEMENTATION = Implementation("mlp", "fused gated MLP", forward, refuse)
