"""What a decoder layer was read as, for as long as all that it was read from is as it was.

Reading its modules and adapters takes Python about 0.5 ms, which is a tenth of its part of a step; to see that nothing
has changed takes a quarter of that.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol, TypeGuard, TypeVar

import torch
from torch import nn

from fastplug.graphs.fingerprint import Fingerprint
from fastplug.ops.lora.group import Group
from fastplug.patching.bind import REMEMBERED
from fastplug.patching.sites import Binding

STATES = 4  # of a layer that are known at a time: in training and evaluation, with its adapters and without
CHANGES = 8  # after so many a layer is read at every call


class LayerPlan(Protocol):
    """A decoder layer as it is at a call."""

    def groups(self) -> Iterator[Group]:
        """Those of its projections."""


P = TypeVar("P", bound=LayerPlan)


class LayerPlans:
    """The plans of one layer."""

    def __init__(self) -> None:
        self._known: list[tuple[Fingerprint, dict[Hashable, Any]]] = []
        self._changes = 0

    @property
    def latest(self) -> Fingerprint | None:
        """What the layer was at its last call; None where it is read at every call."""
        return self._known[0][0] if self._known else None

    def get(self, layer: nn.Module, key: Hashable, read: Callable[[], P | str]) -> P | str:
        """The plan, or why there is none: the one of an earlier call with this key, or what ``read`` makes now."""
        if self._changes > CHANGES:
            return read()
        for i, (fingerprint, plans) in enumerate(self._known):
            if fingerprint.holds(layer):
                if i:
                    self._known.insert(0, self._known.pop(i))
                if key not in plans:
                    plan = read()
                    if not _lasts(plan):
                        return plan
                    plans[key] = plan
                return plans[key]  # type: ignore[no-any-return]
        plan = read()
        self._changes += 1
        if self._changes > CHANGES or getattr(layer, "_is_fsdp_managed_module", False):
            self._changes = CHANGES + 1  # weights that are sharded lie elsewhere at every call
            self._known.clear()
        elif _lasts(plan):
            others = [known for known in self._known if known[0].of_tensors_in(layer)]
            self._known = [(Fingerprint(layer), {key: plan}), *others][:STATES]
        return plan


def _lasts(plan: P | str) -> TypeGuard[P]:
    """Whether nothing in it belongs to one step: several adapters are put together by operations of its graph."""
    return not isinstance(plan, str) and all(tensor is None or tensor.is_leaf for tensor in _tensors(plan))


def _tensors(plan: LayerPlan) -> Iterator[torch.Tensor | None]:
    for group in plan.groups():
        yield from group.tensors()
        yield from (projection.magnitude for projection in group.projections)


def layer_plan(layer: nn.Module, binding: Binding, x: torch.Tensor, read: Callable[[], P | str]) -> P | str:
    """The plan of a layer at this call with input x; ``read`` reads it from the layer's modules."""
    recording = binding.runtime.graphs is not None and binding.runtime.graphs.recording
    if torch.compiler.is_compiling() or recording:  # in a recording other parameters stand in for the layer's
        return read()
    if binding.family.mixture:  # experts are many to compare
        return read()
    plans = REMEMBERED.get(layer)
    if plans is None:
        plans = REMEMBERED[layer] = LayerPlans()
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    key = (binding.runtime.ops, x.dtype, x.device, autocast, torch.is_grad_enabled())
    return plans.get(layer, key, read)  # type: ignore[no-any-return]
