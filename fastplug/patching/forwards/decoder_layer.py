"""A decoder layer as one residual stream: norm, attention, residual add and norm, gated MLP, residual add.

Where the layer as a whole is not covered, its original forward runs and calls its parts, which are patched as sites of
their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from fastplug.families import Family
from fastplug.graphs.replay import replayed
from fastplug.memory.policy import MLPMemory
from fastplug.memory.runtime import planned
from fastplug.ops.lora.gated_mlp import GatedMLP, gated_mlp
from fastplug.ops.lora.group import Group
from fastplug.patching.forwards import attention as attention_forward
from fastplug.patching.forwards import layer_by_row
from fastplug.patching.forwards import mlp as mlp_forward
from fastplug.patching.forwards.blocks import interception
from fastplug.patching.forwards.layer_plans import layer_plan
from fastplug.patching.inspection import replaced_forward
from fastplug.patching.norms import read_norm
from fastplug.patching.sites import Binding, Implementation, NotCovered, Runtime, Site


class Plan(NamedTuple):
    """A layer as it is at a call."""

    attention: attention_forward.Plan
    mlp: GatedMLP
    mlp_norm: torch.Tensor  # the weight of the norm before the MLP

    def groups(self) -> Iterator[Group]:
        yield from (self.attention.spec.group, self.attention.out, self.mlp.gate_up, self.mlp.down)


def forward(layer: nn.Module, binding: Binding, *args: Any, **kwargs: Any) -> Any:
    kwargs = {**dict(zip(binding.parameters, args)), **kwargs}
    x: torch.Tensor = kwargs.pop("hidden_states")
    memory: MLPMemory | None = kwargs.pop("mlp_memory", None)
    family, runtime = binding.family, binding.runtime
    if runtime.options.residual_dtype is not None:
        x = x.to(getattr(torch, runtime.options.residual_dtype))
    # The plan is made before anything runs: a cache must not be updated twice, nor random numbers drawn twice.
    reason = attention_forward.uncovered(kwargs) or interception(layer, ())
    if reason is not None:
        return NotCovered(reason)
    plan = layer_plan(layer, binding, x, lambda: _read(layer, family, runtime, x))
    if isinstance(plan, str):
        return NotCovered(plan)
    mlp = plan.mlp
    if memory is not None:
        mlp = replace(mlp, keep_gate_up=memory.keep_gate_up, tile_rows=memory.tile_rows)
    attention: nn.Module = getattr(layer, family.attention_name)
    mixed, stream, _ = attention_forward.run(plan.attention, attention, family, runtime, x, kwargs)
    out = gated_mlp(mlp, mixed, stream, plan.mlp_norm)
    return (out,) if "output_attentions" in binding.parameters else out  # a tuple up to transformers 4.55


def _read(layer: nn.Module, family: Family, runtime: Runtime, x: torch.Tensor) -> Plan | str:
    """Read the layer's modules as they are now, or say why the fused path does not cover them."""
    attention, mlp = getattr(layer, family.attention_name), getattr(layer, family.mlp_name)
    reason = interception(layer, (family.attention_name, family.mlp_name)) or interception(mlp, (family.activation,))
    if reason is not None:
        return reason
    before = read_norm(getattr(layer, family.input_norm), family)  # type: ignore[arg-type]
    after = read_norm(getattr(layer, family.post_norm), family)  # type: ignore[arg-type]
    if isinstance(before, str) or isinstance(after, str):
        return f"a norm {before if isinstance(before, str) else after}"
    attention_plan = attention_forward.plan(attention, family, runtime, x, before)
    if isinstance(attention_plan, str):
        return attention_plan
    mlp_plan = mlp_forward.plan(mlp, family, runtime, x, after[1])
    return mlp_plan if isinstance(mlp_plan, str) else Plan(attention_plan, mlp_plan, after[0])


def refuse(site: Site, runtime: Runtime) -> str | None:
    layer, family = site.module, site.family
    if not family.llama_layer:
        return layer_by_row.refuse(site, runtime) or "its row describes another kind of layer"
    for name in (family.input_norm, family.post_norm):
        assert name is not None
        found = read_norm(getattr(layer, name), family)
        if isinstance(found, str):
            return f"{name} {found}"
    for name, part in ((family.attention_name, attention_forward), (family.mlp_name, mlp_forward)):
        module: nn.Module = getattr(layer, name)
        reason = replaced_forward(module) or part.refuse(Site(name, name, module, family), runtime)
        if reason is not None:
            return f"{name}: {reason}"
    return None


IMPLEMENTATION = Implementation("decoder_layer", "fused layer", planned(replayed(forward)), refuse)
