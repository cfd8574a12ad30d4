"""What each policy costs each layer: the contract between the cost model, measurements and the solver.

The solver of ``solve.py`` knows nothing but these numbers. They come from shapes (``bytes.py``, ``times.py``) before
anything ran, and from measurements once a few steps did: :func:`calibrated`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fastplug.memory.policy import Policy


@dataclass(frozen=True)
class PolicyCost:
    """One layer under one policy.

    The allocator's view of a step: layer i begins its forward when the layers before it hold ``saved`` bytes each, and
    its backward begins when the layers after it have freed theirs. ``forward_peak`` and ``backward_peak`` are the most
    that layer i has at a time then, its own saved tensors included, above what the layers before it hold.

    Attributes:
        saved: Bytes on the device from the layer's forward to its backward.
        forward_peak: Highest bytes during the forward, the layer's saved tensors and its output included.
        backward_peak: Highest bytes during the backward, saved and recomputed tensors included.
        ms: Milliseconds of forward, recomputation and backward together.
        host: Bytes in pinned host memory from forward to backward.
        shared: Bytes on the device that exist once, however many layers have this policy (staging buffers).
    """

    saved: int
    forward_peak: int
    backward_peak: int
    ms: float
    host: int = 0
    shared: int = 0


@dataclass(frozen=True)
class LayerCosts:
    """One decoder layer under each policy that it may have.

    Attributes:
        policies: Policy -> cost. A layer that fastplug does not run has a single one.
        gradients: Bytes of parameter gradients that the layer's backward leaves behind.
    """

    policies: Mapping[Policy, PolicyCost]
    gradients: int = 0

    def __getitem__(self, policy: Policy) -> PolicyCost:
        return self.policies[policy]

    def only(self, *policies: Policy) -> LayerCosts:
        """The same with a choice of ``policies``; with all where it has none of them."""
        kept = {policy: cost for policy, cost in self.policies.items() if policy in policies}
        return replace(self, policies=kept or dict(self.policies))


def calibrated(
    layers: Sequence[LayerCosts],
    ms: Mapping[tuple[int, Policy], float],
    saved: Mapping[tuple[int, Policy], int] | None = None,
) -> tuple[LayerCosts, ...]:
    """The costs with measured numbers in the place of reasoned ones.

    Args:
        layers: Costs from shapes.
        ms: (index of the layer, policy) -> measured milliseconds of forward, recomputation and backward. Any subset.
        saved: Likewise the measured bytes that a layer keeps; its peaks move by the same difference.

    Layers with equal reasoned costs are one kind: a measurement counts for all of its kind (their mean), or the noise
    of single layers would choose their policies. Policies without a measurement are scaled by the mean ratio of
    measured to reasoned milliseconds in the kind, or, where a kind has no measurement at all, of all layers.
    """
    kinds = _kinds(layers)
    ratios: dict[int, list[float]] = defaultdict(list)
    measured: dict[tuple[int, Policy], list[float]] = defaultdict(list)
    bytes_of: dict[tuple[int, Policy], int] = {}
    for (index, policy), value in ms.items():
        kind = kinds[index]
        measured[kind, policy].append(value)
        if layers[index][policy].ms > 0:
            ratios[kind].append(value / layers[index][policy].ms)
    for (index, policy), size in (saved or {}).items():
        bytes_of[kinds[index], policy] = max(size, bytes_of.get((kinds[index], policy), 0))
    every = [ratio for found in ratios.values() for ratio in found]
    made: dict[int, LayerCosts] = {}
    for index, layer in enumerate(layers):
        kind = kinds[index]
        if kind in made:
            continue
        known = ratios[kind] or every or [1.0]
        ratio = sum(known) / len(known)
        costs = {}
        for policy, cost in layer.policies.items():
            values = measured.get((kind, policy))
            time = sum(values) / len(values) if values else cost.ms * ratio
            more = bytes_of.get((kind, policy), cost.saved) - cost.saved
            costs[policy] = replace(
                cost,
                ms=time,
                saved=cost.saved + more,
                forward_peak=cost.forward_peak + more,
                backward_peak=max(cost.backward_peak + more, cost.saved + more),
            )
        made[kind] = replace(layer, policies=costs)
    return tuple(replace(layer, policies=made[kind].policies) for layer, kind in zip(layers, kinds))


def _kinds(layers: Sequence[LayerCosts]) -> list[int]:
    """For each layer the index of the first one whose policies cost the same."""
    first: list[int] = []
    found: list[int] = []
    for index, layer in enumerate(layers):
        same = next((i for i in first if layers[i].policies == layer.policies), index)
        if same == index:
            first.append(index)
        found.append(same)
    return found
