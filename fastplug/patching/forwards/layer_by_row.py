"""Decoder layers that differ from Llama's in what their row says: the composing forward of every other family.

Norms before or after attention and MLP, or both; LayerNorm; attention and MLP side by side; factors and dropouts on
what is added to the residual stream; MLPs without a gate; mixtures of experts, which run as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastplug.families import Family
from fastplug.graphs.replay import replayed
from fastplug.memory.policy import MLPMemory
from fastplug.memory.runtime import planned
from fastplug.ops.lora.gated_mlp import GatedMLP, gated_mlp
from fastplug.ops.lora.group import Group
from fastplug.ops.rms_norm.autograd import rms_norm
from fastplug.patching.bind import parameter_names
from fastplug.patching.forwards import attention as attention_forward
from fastplug.patching.forwards import mlp as mlp_forward
from fastplug.patching.forwards.attention import NormRead
from fastplug.patching.forwards.blocks import interception
from fastplug.patching.forwards.layer_plans import layer_plan
from fastplug.patching.inspection import replaced_forward
from fastplug.patching.norms import read_norm
from fastplug.patching.sites import Binding, Implementation, NotCovered, Runtime, Site

Module = Callable[[torch.Tensor], torch.Tensor]
MLP = GatedMLP | mlp_forward.PlainMLP | None  # None: it runs as a module


@dataclass(frozen=True)
class Plan:
    """A layer as it is at this call. A norm is what the fused ops read of it, the module itself, or None."""

    attention: attention_forward.Plan
    mlp: MLP
    before: NormRead | Module | None
    attention_post: NormRead | None
    between: NormRead | Module | None
    mlp_post: NormRead | None

    def groups(self) -> Iterator[Group]:
        yield from (self.attention.spec.group, self.attention.out)
        if self.mlp is not None:
            yield self.mlp.gate_up if isinstance(self.mlp, GatedMLP) else self.mlp.up
            yield self.mlp.down


def forward(layer: nn.Module, binding: Binding, *args: Any, **kwargs: Any) -> Any:
    kwargs = {**dict(zip(binding.parameters, args)), **kwargs}
    x: torch.Tensor = kwargs.pop("hidden_states")
    memory: MLPMemory | None = kwargs.pop("mlp_memory", None)
    family, runtime = binding.family, binding.runtime
    if runtime.options.residual_dtype is not None:
        x = x.to(getattr(torch, runtime.options.residual_dtype))
    attention: nn.Module = getattr(layer, family.attention_name)
    mlp = _mlp_of(layer, family)
    if family.rope_of_layer is not None and family.rope_of_layer[0] in kwargs:
        first, second, switch = family.rope_of_layer
        both = {True: kwargs.pop(first), False: kwargs.pop(second)}
        kwargs["position_embeddings"] = both[bool(getattr(attention, switch))]
    # All is read before anything runs: a cache must not be updated twice, nor random numbers drawn twice.
    reason = attention_forward.uncovered(kwargs) or interception(layer, ())
    if reason is None and kwargs.get("output_router_logits") and not family.plays(mlp, "mlp"):
        reason = "router logits were asked for"
    if reason is not None:
        return NotCovered(reason)
    planned = layer_plan(layer, binding, x, lambda: _read(layer, attention, mlp, family, runtime, x))
    if isinstance(planned, str):
        return NotCovered(planned)
    if memory is not None and isinstance(planned.mlp, GatedMLP):
        told = replace(planned.mlp, keep_gate_up=memory.keep_gate_up, tile_rows=memory.tile_rows)
        planned = replace(planned, mlp=told)
    entering = planned.before(x) if callable(planned.before) else x
    if family.input_norm is not None and not callable(planned.before) and _shares_norm(layer, family):
        entering = _normed(planned.before, x, runtime)
    mixed, stream, _ = attention_forward.run(planned.attention, attention, family, runtime, entering, kwargs)
    if entering is not x:
        stream = x
    if family.dropouts[0] is not None:
        mixed = getattr(layer, family.dropouts[0])(mixed)
    dropout = _mlp_dropout(layer, mlp, planned.mlp, family)
    if planned.attention_post is not None:
        mixed = _normed(planned.attention_post, mixed.to(stream.dtype), runtime)
    factor = _factor(layer, family)
    if factor != 1.0:
        mixed = mixed * factor
    if _parallel(layer, family):
        read = entering if planned.between is None else _normed(planned.between, stream, runtime)
        added = _mlp(planned.mlp, mlp, read)
        out = stream + mixed + _finished(added, planned, dropout, factor, runtime, stream)
    else:
        out = _second_half(planned, mlp, mixed, stream, dropout, factor, runtime)
    return (out,) if "output_attentions" in binding.parameters else out  # a tuple up to transformers 4.55


def _read(
    layer: nn.Module, attention: nn.Module, mlp: nn.Module, family: Family, runtime: Runtime, x: torch.Tensor
) -> Plan | str:
    """Read the layer's present state, or say why the fused path does not cover it."""
    fused = family.plays(mlp, "mlp")  # a mixture of experts is called as it is, hooks and all
    reason = interception(layer, (family.attention_name, family.mlp_name) if fused else (family.attention_name,))
    if reason is None and fused:
        reason = interception(mlp, (family.activation,))
    if reason is not None:
        return reason
    norms: list[Any] = []
    for name in (family.input_norm, family.attention_post_norm, family.post_norm, family.mlp_post_norm):
        norm = None if name is None else getattr(layer, name)  # a layer may have None for a norm (StableLM)
        if norm is not None and family.norm.kind == "rms":
            norm = read_norm(norm, family)
            if isinstance(norm, str):
                return f"{name} {norm}"
        norms.append(norm)
    before, attention_post, between, mlp_post = norms
    inside = None if callable(before) or _shares_norm(layer, family) else before
    attention_plan = attention_forward.plan(attention, family, runtime, x, inside)
    if isinstance(attention_plan, str):
        return attention_plan
    mlp_plan: MLP | str = None
    if fused and family.gate is None:
        mlp_plan = mlp_forward.plan_plain(mlp, family, runtime, x)
    elif fused:
        inside = None if between is None or callable(between) or _parallel(layer, family) else between
        mlp_plan = mlp_forward.plan(mlp, family, runtime, x, None if inside is None else inside[1])
        if isinstance(mlp_plan, GatedMLP) and inside is not None:
            drops = _mlp_dropout(layer, mlp, mlp_plan, family) is not None
            mlp_plan = replace(mlp_plan, factor=_factor(layer, family), joined=mlp_post is None and not drops)
    if isinstance(mlp_plan, str):
        return mlp_plan
    return Plan(attention_plan, mlp_plan, before, attention_post, between, mlp_post)


def _second_half(
    planned: Plan,
    mlp: nn.Module,
    mixed: torch.Tensor,
    stream: torch.Tensor,
    dropout: Module | None,
    factor: float,
    runtime: Runtime,
) -> torch.Tensor:
    """The residual add, the norm, the MLP and the other residual add, of layers that run one after the other."""
    spec, between = planned.mlp, planned.between
    if isinstance(spec, GatedMLP) and spec.norm is not None:
        assert between is not None
        weight = between[0]  # type: ignore[index]
        if spec.joined:
            return gated_mlp(spec, mixed, stream, weight)  # type: ignore[no-any-return]
        added, h = gated_mlp(spec, mixed, stream, weight)
        return h + _finished(added, planned, dropout, factor, runtime, h)  # type: ignore[no-any-return]
    if between is None or callable(between):
        h = stream + mixed
        read = h if between is None else between(h)
    else:
        eps, offset, cast_first = between[1].eps, between[1].offset, between[1].cast_first
        read, h = rms_norm(
            mixed.to(stream.dtype), between[0], eps, offset, cast_first, stream, implementation=runtime.ops.rms_norm
        )
    return h + _finished(_mlp(spec, mlp, read), planned, dropout, factor, runtime, h)


def _mlp(spec: MLP, mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(spec, GatedMLP):
        return gated_mlp(spec, x)  # type: ignore[no-any-return]
    out = mlp(x) if spec is None else spec(x)
    return (out[0] if isinstance(out, tuple) else out).view(x.shape)  # some return router scores beside it


def _finished(
    added: torch.Tensor,
    planned: Plan,
    dropout: Module | None,
    factor: float,
    runtime: Runtime,
    stream: torch.Tensor,
) -> torch.Tensor:
    """The MLP's output as it is added to the residual stream."""
    if planned.mlp_post is not None:
        added = _normed(planned.mlp_post, added.to(stream.dtype), runtime)
    if dropout is not None:
        added = dropout(added)
    return added if factor == 1.0 else added * factor


def _normed(norm: NormRead | Module | None, x: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    if norm is None:
        return x
    if callable(norm):
        return norm(x)
    weight, row = norm
    return rms_norm(  # type: ignore[no-any-return]
        x, weight, row.eps, row.offset, row.cast_first, implementation=runtime.ops.rms_norm
    )


def _mlp_dropout(layer: nn.Module, mlp: nn.Module, spec: MLP, family: Family) -> Module | None:
    """What drops the MLP's output at this call: a module of the layer, or the MLP itself, which a fused one leaves out.

    A plain MLP does so on its own (StarCoder2).
    """
    if family.dropouts[1] is not None:
        module: Any = getattr(layer, family.dropouts[1])
        return module if module.training and module.p > 0 else None
    p = mlp_forward.output_dropout(mlp, family) if isinstance(spec, GatedMLP) else 0.0
    return functools.partial(F.dropout, p=p) if p else None


def _mlp_of(layer: nn.Module, family: Family) -> nn.Module:
    return getattr(layer, family.mlp_of(layer))  # type: ignore[no-any-return]


def _factor(layer: nn.Module, family: Family) -> float:
    return 1.0 if family.residual_multiplier is None else getattr(layer, family.residual_multiplier)


def _parallel(layer: nn.Module, family: Family) -> bool:
    return bool(getattr(layer, family.parallel)) if isinstance(family.parallel, str) else family.parallel


def _shares_norm(layer: nn.Module, family: Family) -> bool:
    """Whether the MLP reads the same normalized input as attention."""
    return _parallel(layer, family) and (family.post_norm is None or getattr(layer, family.post_norm) is None)


def refuse(site: Site, runtime: Runtime) -> str | None:
    layer, family = site.module, site.family
    if family.llama_layer:
        return "its row describes a layer of Llama's kind"
    parameters = parameter_names(type(layer))
    for name in family.layer_parameters:
        if name in parameters:
            return f"in this transformers version the layer itself works on the mask (it takes {name})"
    norms = (family.input_norm, family.attention_post_norm, family.post_norm, family.mlp_post_norm)
    for name in filter(None, norms if family.norm.kind == "rms" else ()):
        norm = read_norm(getattr(layer, name), family)
        if isinstance(norm, str):
            return f"{name} {norm}"
    attention: nn.Module = getattr(layer, family.attention_name)
    if not family.plays(attention, "attention"):
        return f"{family.attention_name} is a {type(attention).__qualname__}"
    part = Site("attention", family.attention_name, attention, family)
    reason = replaced_forward(attention) or attention_forward.refuse(part, runtime)
    if reason is not None:
        return f"{family.attention_name}: {reason}"
    mlp = _mlp_of(layer, family)
    if family.plays(mlp, "mlp"):
        reason = replaced_forward(mlp) or mlp_forward.refuse(Site("mlp", family.mlp_name, mlp, family), runtime)
        return None if reason is None else f"{family.mlp_name}: {reason}"
    return None if family.mixture else f"{family.mlp_name} is a {type(mlp).__qualname__}"


IMPLEMENTATION = Implementation("decoder_layer", "fused layer by row", planned(replayed(forward)), refuse)
