"""The planner at work: which policy each decoder layer runs under, forward by forward.

:func:`attach` gives a patched model a :class:`Planner`; :func:`planned` is what a decoder layer's fast forward asks. In
a training forward the first layer makes the plan for the micro-batch's shape, or finds the one it made before: lengths
are rounded up to a coarse grid, so random lengths need few plans. Everywhere else (evaluation, generation, under
torch.compile, a host that checkpoints the layer from outside) the fast forward runs as if there were no plan.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastplug.memory.checkpoint import offloader, run
from fastplug.memory.node import Fetch, guarded
from fastplug.memory.oom import retried
from fastplug.memory.planner import Planner
from fastplug.memory.policy import Policy
from fastplug.memory.takeover import pass_on, permitted, switched_by
from fastplug.ops.recompute import checkpointing
from fastplug.patching import caches
from fastplug.patching.bind import bind, parameter_names
from fastplug.patching.report import PATCHED, Report
from fastplug.patching.sites import KEY, Binding, Choice, FastForward, NotCovered, Site

logger = logging.getLogger("fastplug")
FROM_OUTSIDE = (
    "the host checkpoints decoder layers from outside (torch.utils.checkpoint, checkpoint_wrapper or DeepSpeed around "
    "the layer), which fastplug cannot replace: turn that off, and the plan decides what is computed again"
)


@dataclass
class State:
    """A decoder layer's place in its plan. It hangs on the layer's binding."""

    planner: Planner
    index: int
    switch: weakref.ref[nn.Module] | None = None  # the module that the host's checkpointing is switched by, if another
    uncovered: bool = False  # the fast forward left a call of this layer to the original one


def planned(fast: FastForward) -> FastForward:
    """A decoder layer's fast forward that keeps what the plan says."""

    @functools.wraps(fast)
    def forward(layer: nn.Module, binding: Binding, *args: Any, **kwargs: Any) -> Any:
        state: State | None = binding.memory
        if state is None:
            return fast(layer, binding, *args, **kwargs)
        if torch.compiler.is_compiling():
            if layer.training and torch.is_grad_enabled():
                state.planner.trace()
            return fast(layer, binding, *args, **kwargs)
        if state.planner.off is not None:
            return fast(layer, binding, *args, **kwargs)
        kwargs = {**dict(zip(binding.parameters, args)), **kwargs}
        x = kwargs.get("hidden_states")
        if not (layer.training and torch.is_grad_enabled() and isinstance(x, torch.Tensor) and x.dim() == 3):
            state.planner.spare()  # an evaluation finds the memory that it found without a plan
            return fast(layer, binding, **kwargs)
        reason = _prevented(layer, state, kwargs)
        if reason is not None:
            if not state.planner.compiled:  # which leaves a checkpointed layer to the interpreter now and then
                state.planner.note(reason)
            return fast(layer, binding, **kwargs)
        del kwargs["hidden_states"], args
        return _run(fast, layer, binding, state, x, kwargs)

    return forward


def _run(
    fast: FastForward, layer: nn.Module, binding: Binding, state: State, x: torch.Tensor, kwargs: dict[str, Any]
) -> Any:
    planner = state.planner
    policy = planner.enter(state.index, layer, x)
    if state.uncovered and _permission(layer, state):
        return run(Policy.RESIDUAL, fast, layer, binding, hidden_states=x, **kwargs)
    tile_rows = planner.tile_rows
    if not planner.records:
        fast = getattr(fast, "__wrapped__", fast)

    def compute(x: torch.Tensor) -> Any:
        return run(policy, fast, layer, binding, tile_rows=tile_rows, hidden_states=x, **kwargs)

    def again(x: torch.Tensor) -> Any:
        return fast(layer, binding, hidden_states=x, **kwargs)

    seen = planner.observe(state.index)
    recorded = planner.records and binding.graphs is not None and bool(binding.graphs.graphs)
    if not recorded and _guards(layer, binding, kwargs):  # what CUDA graphs hold cannot be dropped
        observe = None if seen is None else seen.backward
        result = guarded(
            planner.room,
            policy,
            compute,
            again,
            x,
            planner.held(state.index),
            state.index,
            observe,
            lambda x: _fetch(binding, x),
        )
    else:  # what others keep can be dropped for it
        result = retried(planner.room, lambda: compute(x))
    if type(result) is NotCovered:
        state.uncovered = True
        if _permission(layer, state):
            return run(Policy.RESIDUAL, fast, layer, binding, hidden_states=x, **kwargs)
    elif seen is not None:
        seen.forward_done()
    return result


def _fetch(binding: Binding, x: torch.Tensor) -> Fetch:
    """A way to get an input that the layer which just ran has offloaded."""
    group = offloader(binding).latest
    packed = group.pack(x)
    return lambda: group.unpack(packed)


def _prevented(layer: nn.Module, state: State, kwargs: dict[str, Any]) -> str | None:
    """Why this call cannot be planned; with the host's permission, a cache is left out as the host would."""
    if torch._C._current_graph_task_id() != -1 or checkpointing() == "checkpointed":
        return FROM_OUTSIDE
    if checkpointing() != "nothing":
        return "hooks of the host (torch.autograd.graph.saved_tensors_hooks) take what layers keep"
    for name in caches.NAMES:
        if kwargs.get(name) is not None and not caches.stands_in(kwargs[name]):
            if not _permission(layer, state):
                return (
                    "a training step fills a cache of keys and values, which computing a layer again would fill twice: "
                    "set use_cache=False in the model's config, or the host's gradient checkpointing"
                )
            kwargs[name] = None
            if kwargs.get("use_cache"):
                kwargs["use_cache"] = False
    return None


def _permission(layer: nn.Module, state: State) -> bool:
    """Whether the host has switched gradient checkpointing on."""
    switch = layer if state.switch is None else state.switch()
    return switch is not None and bool(permitted(switch))


def _guards(layer: nn.Module, binding: Binding, kwargs: dict[str, Any]) -> bool:
    """Whether the layer may become one node: then nothing but its input and its parameters may take part in its graph.

    The router logits of a mixture of experts go to the loss past the layer's output, FSDP1's weights are no leaves.
    """
    if binding.family.mixture or (hasattr(layer, "_is_fsdp_managed_module") and not _is_fsdp2(layer)):
        return False
    for value in kwargs.values():
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                return False
    return True


def _is_fsdp2(layer: nn.Module) -> bool:
    return any(kind.__module__.startswith("torch.distributed.fsdp") for kind in type(layer).__mro__)


def attach(model: nn.Module, decided: Sequence[tuple[Site, Choice]], report: Report) -> None:
    """Give the decoder layers of a patched model their places in a plan; layers that have one keep it.

    Args:
        model: What was given to ``apply``.
        decided: Its sites; those patched are bound.
        report: Where it is said that there is nothing to plan.

    Raises:
        OptionError: The budget is smaller than the weights, or there is no such plan to train by.
    """
    groups: dict[int, tuple[nn.Module, list[tuple[Site, bool]]]] = {}
    for site, choice in decided:
        if site.role == "decoder_layer":
            owner = owner_of(model, site.name)
            groups.setdefault(id(owner), (owner, []))[1].append((site, choice.status == PATCHED))
    if not any(fused for _, sites in groups.values() for _, fused in sites):
        report.notes.append("memory= plans nothing: no decoder layer is patched as a whole")
    for owner, sites in groups.values():
        bindings = [site.module.__dict__.get(KEY) for site, _ in sites]
        ours = [binding for binding in bindings if binding is not None]
        if not ours:
            continue
        known = [binding.memory.planner for binding in ours if binding.memory is not None]
        if known and len(known) == len(ours) and known[0].count == len(sites):
            continue
        planner = Planner(owner, sites, ours[0].runtime.options, ours[0].report)
        switch = _take_switch(owner, sites, ours, planner)
        for index, binding in enumerate(bindings):
            if binding is not None:
                binding.memory = State(planner, index, switch)
                binding.runtime.memory = planner


def _take_switch(
    model: nn.Module, sites: list[tuple[Site, bool]], ours: list[Binding], planner: Planner
) -> weakref.ref[nn.Module] | None:
    """Bind the module whose own attribute switches checkpointing for all layers, where all are patched."""
    module = switched_by((site.module for site, _ in sites), model)
    if module is None or not all(fused for _, fused in sites):
        return None
    if KEY not in module.__dict__:
        first = ours[0]
        names = parameter_names(type(module))
        bind(
            module,
            Binding(type(module), "", first.family, first.runtime, "the switch of checkpointing", first.report, names),
            pass_on,
        )
    module.__dict__[KEY].memory = State(planner, -1)
    return weakref.ref(module)


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """The language model that a decoder layer belongs to: the innermost one around it that has a head."""
    found, module = None, model
    path: list[nn.Module] = [model]
    for part in name.split("."):
        module = getattr(module, part)
        path.append(module)
    for module in path:
        head = getattr(module, "get_output_embeddings", None)
        if hasattr(module, "config") and callable(head) and not isinstance(module, nn.ModuleList):
            found = module if found is None or head() is not None else found
    return model if found is None else found


def planners(model: nn.Module) -> list[Planner]:
    """The planners of a patched model: one for each language model in it."""
    found: dict[int, Planner] = {}
    for module in model.modules():
        binding: Binding | None = module.__dict__.get(KEY)
        if binding is not None and binding.memory is not None:
            found[id(binding.memory.planner)] = binding.memory.planner
    return list(found.values())


__all__ = ["State", "attach", "owner_of", "planned", "planners"]
