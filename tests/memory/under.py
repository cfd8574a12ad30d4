"""Put the decoder layers of a patched model under a memory policy, without a planner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fastplug.memory.checkpoint import run
from fastplug.memory.policy import Policy
from fastplug.patching.bind import patched_class
from fastplug.patching.forwards import decoder_layer, layer_by_row
from fastplug.patching.sites import KEY, Binding

FAST = {made.name: made.forward for made in (decoder_layer.IMPLEMENTATION, layer_by_row.IMPLEMENTATION)}


def layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers that run as a whole."""
    bound = [module for module in model.modules() if KEY in module.__dict__]
    return [module for module in bound if module.__dict__[KEY].implementation in FAST]


def under(model: nn.Module, policy: Policy, tile_rows: int | None = None) -> Any:
    """The same model, whose layers keep what the policy says."""
    found = layers(model)
    assert found
    for layer in found:
        binding: Binding = layer.__dict__[KEY]
        base: Any = binding.base
        layer.__class__ = patched_class(base, _told(policy, FAST[binding.implementation], tile_rows))
    return model


def _told(policy: Policy, fast: Callable[..., Any], tile_rows: int | None) -> Callable[..., Any]:
    def forward(layer: nn.Module, binding: Binding, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(binding.parameters, args)), **kwargs}
        return run(policy, fast, layer, binding, tile_rows=tile_rows, **kwargs)

    return forward


def calls(function: Callable[[], Any], name: str = "aten::scaled_dot_product_attention") -> int:
    """How often an op runs while ``function`` does."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        function()
    return sum(event.count for event in seen.key_averages() if event.key == name)


def left_behind(function: Callable[[], Any], device: torch.device) -> int:
    """Bytes on the device that ``function`` has taken and not given back when it returns, its result included."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        result = function()
        after = torch.cuda.memory_allocated(device)
        del result
        return after - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = function()
    del result
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    return sum(event.nbytes() for event in events if event.name() == "[memory]")
