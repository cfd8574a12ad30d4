"""Which policies the layers of a step may have together: what has to be decided before the solver adds up bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from fastplug.memory.costs import LayerCosts
from fastplug.memory.policy import SPREAD, Policy

COPYING = 0.9
"""Share of the computation's time that copies beside it may take."""


def choices(layers: Sequence[LayerCosts], host_budget: int | None) -> list[tuple[list[LayerCosts], int]]:
    """The layers with some of the policies that need bytes of their own once (at most two), and those bytes.

    Times include the waiting for copies. :data:`SPREAD` stands alone, in one layer of every few: as many as its copies
    take to pass beside the computation.
    """
    costly = sorted(
        {p for layer in layers for p, cost in layer.policies.items() if cost.shared}, key=list(Policy).index
    )
    free = {p for layer in layers for p in layer.policies if p not in costly}
    others = [p for p in costly if p is not SPREAD]
    used: list[tuple[set[Policy], int]] = [
        ({*free, *some}, 1) for count in range(3) for some in itertools.combinations(others, count)
    ]
    if SPREAD in costly:
        used += [({*free, SPREAD}, every) for every in _distances(layers)]
    made = []
    for policies, every in used:
        choice = []
        for i, layer in enumerate(layers):
            allowed = policies if i % every == 0 else policies - {SPREAD}
            layer = layer.only(*(p for p in layer.policies if p in allowed))
            costs = {
                p: replace(cost, ms=cost.ms + cost.waiting(every if p is SPREAD else 1)) if cost.copy_ms else cost
                for p, cost in layer.policies.items()
            }
            choice.append(replace(layer, policies=costs))
        choice = _within_host(choice, host_budget)
        left = {p: cost.shared for layer in choice for p, cost in layer.policies.items() if cost.shared}
        made.append((choice, sum(left.values())))
    return made


def _distances(layers: Sequence[LayerCosts]) -> list[int]:
    """How far apart layers must be whose copies under :data:`SPREAD` pass beside the computation, and a little more."""
    costs = [layer[SPREAD] for layer in layers if SPREAD in layer.policies]
    least = max(
        math.ceil(cost.copy_ms / (COPYING * min(cost.forward_ms, cost.ms - cost.forward_ms)))
        if 0 < cost.forward_ms < cost.ms
        else 1
        for cost in costs
    )
    return [every for every in range(least, least + 3) if every < len(layers)]


def _within_host(layers: Sequence[LayerCosts], host_budget: int | None) -> list[LayerCosts]:
    """Take the policies that use host memory from the layers that it does not reach to: the early ones come first."""
    made, left = [], host_budget
    for layer in layers:
        most = max((cost.host for cost in layer.policies.values()), default=0)
        if left is not None and most > left:
            layer = layer.only(*(policy for policy, cost in layer.policies.items() if cost.host <= 0))
        elif left is not None:
            left -= most
        made.append(layer)
    return made


__all__ = ["choices"]
