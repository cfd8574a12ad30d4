"""Layers that are replayed as CUDA graphs, in the books of a plan.

A recording holds for good what its layer keeps otherwise from its forward to its backward only, and works in a pool of
memory that nobody else can use. So with layers that are recorded a step needs, at every moment, what all of them keep,
what one of them works with, and what head and loss need, one beside the other. Other shapes of batches find the first
of these taken. What recordings hold cannot be dropped when memory runs out either, so a part of the budget stays free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastplug.graphs import recorder, state
from fastplug.memory.calibration import Agreed
from fastplug.memory.costs import LayerCosts
from fastplug.memory.plan import Plan, Shape
from fastplug.memory.policy import Policy

# Of a budget that a step with recorded layers may need: nothing that they hold can be dropped, and memory lies unused
# between their pools. An H100 reserved 14.3 GiB for recorded steps of 2 x 512 tokens that allocated 10.1 at their peak.
FULL = 0.65
RECORDABLE = (Policy.KEEP, Policy.KEEP_ATTENTION, Policy.RESIDUAL)
Costs = tuple[LayerCosts, ...]


def possible(graphs: str, device: torch.device) -> bool:
    """Whether layers on the device may be recorded, under the option ``graphs``."""
    return graphs != "off" and recorder.recorder_for(device) is not None


class Recordings:
    """What the layers of one model have recorded.

    Args:
        bindings: Gives those of the layers in order, None for a layer without one.
    """

    def __init__(self, bindings: Callable[[], list[Any]]) -> None:
        self._bindings = bindings
        self.possible = False  # whether any layer may be recorded under some plan
        self.costs: dict[Shape, Costs] = {}  # what was reasoned for the shapes whose plans let layers be recorded
        self._eager: Counter[Shape] = Counter()

    def plan(self, shape: Shape, costs: Costs | None) -> None:
        """A plan was made for a shape, with these costs if its layers may be recorded."""
        self.costs.pop(shape, None)
        if costs is not None:
            self.costs[shape] = costs

    def held(self) -> dict[Shape, int]:
        """Bytes that recordings hold, by the shape that they were made for."""
        found: dict[Shape, int] = {}
        for index, binding in enumerate(self._bindings() if self.costs else ()):
            state = None if binding is None else binding.graphs
            for key, graphs in state.graphs.items() if state is not None else ():
                for graph in graphs:
                    shape = key[1], graph.length
                    if shape in self.costs:
                        layer, again = self.costs[shape][index], key[0] == "checkpointed"
                        # Without its activations a recording holds no more than what all layers share.
                        found.setdefault(shape, _shared(self.costs[shape]))
                        found[shape] += 0 if again else layer[Policy.KEEP].saved
        return found

    def begins(self, shape: Shape, held: Mapping[Shape, int]) -> bool:
        """Whether the forward that begins now is the one in which the layers are recorded for a shape."""
        if shape not in self.costs or shape in held:
            return False
        self._eager[shape] += 1
        return self._eager[shape] == state.EAGER_CALLS + 1

    def forget(self) -> None:
        """Let go of all recordings; what is still to be recorded is."""
        self._eager.clear()
        for binding in self._bindings():
            if binding is not None:
                binding.graphs = None

    def give_up(self) -> None:
        """Let go of them, and record no more."""
        self.forget()
        self.possible = False
        self.costs.clear()


def _shared(layers: Costs) -> int:
    """What all layers share: buffers, and the gradients of one."""
    buffers = max(cost.shared for layer in layers for p, cost in layer.policies.items() if p in RECORDABLE)
    return buffers + max(layer.gradients for layer in layers)


def beyond(plan: Plan, layers: Costs, head_peak: int, agreed: Agreed, fixed: int) -> int:
    """Bytes that a step needs beyond its plan if the layers are recorded.

    Args:
        plan: The plan, all of whose layers keep what can be recorded.
        layers: The costs that it was made of.
        head_peak: Bytes of head and loss.
        agreed: What was agreed on.
        fixed: Bytes that are always there.
    """
    chosen = [layer[policy] for layer, policy in zip(layers, plan.policies, strict=True)]
    keeps = sum(cost.saved for cost in chosen)
    works = max(max(cost.forward_peak, cost.backward_peak) - cost.saved for cost in chosen)
    shared = sum({policy: cost.shared for policy, cost in zip(plan.policies, chosen)}.values())
    shared += max(layer.gradients for layer in layers)
    gradients = sum(layer.gradients for layer in layers)
    need = fixed + keeps + works + head_peak + gradients + shared
    return max(0, agreed.context + need + agreed.reserve.beside(need) - plan.total)


__all__ = ["FULL", "RECORDABLE", "Recordings", "beyond", "possible"]
