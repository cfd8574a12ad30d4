"""The fastest choice of policies that fits a budget.

What a choice needs is said in ``moments.py``, which policies may be chosen together in ``choices.py``. The choice is a
multiple-choice knapsack with a constraint at every prefix. It is solved exactly by dynamic programming over the pairs
(bytes held, picoseconds) that no other pair beats in both (Nemhauser & Ullmann 1969).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fastplug.errors import OptionError
from fastplug.memory.budget import gib
from fastplug.memory.choices import choices
from fastplug.memory.costs import LayerCosts
from fastplug.memory.moments import assemble, gradients_after
from fastplug.memory.plan import Plan
from fastplug.memory.policy import Policy
from fastplug.memory.reserve import NOTHING, Reserve

STATES = 16384
"""Undominated pairs that are followed. 32 equal layers have about 2,000; where there are more, neighbours are merged,
which may cost up to a 16384th of the budget per layer but never exceeds it."""
SMALL = 0.005  # of what is always there: parts below that are not named in an error


class DoesNotFit(OptionError):
    """No choice of policies fits the budget.

    Attributes:
        least: The least budget, in bytes, that would fit.
    """

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least


def solve(
    layers: Sequence[LayerCosts],
    fixed_bytes: int | Mapping[str, int],
    budget: int,
    *,
    head_peak: int = 0,
    accumulating: bool = True,
    host_budget: int | None = None,
    context: int = 0,
    reserve: Reserve = NOTHING,
    other_ms: float = 0.0,
    batch: int = 0,
    sequence: int = 0,
) -> Plan:
    """The plan with the least milliseconds whose peak stays within ``budget``.

    Args:
        layers: The decoder layers in the order of the forward.
        fixed_bytes: Bytes that are there at every moment (weights, adapters, optimizer states), as one number or by
            name. Gradients are taken from ``layers`` and do not belong here.
        budget: Bytes of reserved memory plus the CUDA context.
        head_peak: Bytes that head, loss and what lies around the layers need beside what the layers hold.
        accumulating: Whether gradients of an earlier micro-batch are there during the forward.
        host_budget: Bytes of pinned host memory that may be used; None: as many as it takes.
        context: Bytes of the CUDA context.
        reserve: What is reserved beyond the allocated bytes.
        other_ms: Milliseconds of the step outside the layers.
        batch, sequence: The shape that this plan is for.

    Of plans that take equally long the one that holds least is taken, of those that hold equally much the one whose
    late layers keep most. The same input always gives the same plan.

    Raises:
        DoesNotFit: Not even the least choice fits; the message has the numbers.
    """
    fixed = {"fixed": fixed_bytes} if isinstance(fixed_bytes, int) else dict(fixed_bytes)
    always = sum(fixed.values())
    room = reserve.allocatable(budget - context) - always
    best: tuple[int, int, tuple[Policy, ...]] | None = None
    for choice, shared in choices(layers, host_budget):
        found = _search(choice, room - shared, head_peak, accumulating)
        if found is not None:
            found = (found[0], found[1] + shared, found[2])
            best = found if best is None or found[:2] < best[:2] else best
    if best is None:
        least = least_budget(
            layers,
            fixed,
            head_peak=head_peak,
            accumulating=accumulating,
            host_budget=host_budget,
            context=context,
            reserve=reserve,
        )
        raise _error(fixed, budget, least, context)
    return assemble(
        layers,
        best[2],
        fixed,
        budget,
        head_peak=head_peak,
        accumulating=accumulating,
        context=context,
        reserve=reserve,
        other_ms=other_ms,
        batch=batch,
        sequence=sequence,
    )


def _search(
    layers: Sequence[LayerCosts], room: int, head_peak: int, accumulating: bool
) -> tuple[int, int, tuple[Policy, ...]] | None:
    """(picoseconds, bytes held at the end, policies) of the best choice, or None."""
    order = list(Policy)
    later = gradients_after(layers, accumulating)
    everything = sum(layer.gradients for layer in layers)
    at_forward = everything if accumulating else 0
    if everything > room:
        return None
    held, time = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    trail: list[tuple[list[Policy], torch.Tensor, torch.Tensor]] = []
    cell = max(1, room // STATES)
    for i, layer in enumerate(layers):
        # The policy that keeps most comes first: among equal pairs the first survives, and late layers keep most.
        policies = sorted(layer.policies, key=lambda p: (-layer[p].saved, order.index(p)))
        parts = []
        for number, policy in enumerate(policies):
            cost = layer[policy]
            need = max(cost.forward_peak + at_forward, cost.backward_peak + later[i])
            (fits,) = torch.nonzero(held + need <= room, as_tuple=True)
            chosen = torch.full_like(fits, number)
            parts.append((held[fits] + cost.saved, time[fits] + round(cost.ms * 1e9), chosen, fits))
        held, time, chosen, parent = (torch.cat(column) for column in zip(*parts))
        if not len(held):
            return None
        kept = _undominated(held, time, chosen, cell)
        held, time = held[kept], time[kept]
        trail.append((policies, chosen[kept], parent[kept]))
    (fits,) = torch.nonzero(held + head_peak + at_forward <= room, as_tuple=True)
    if not len(fits):
        return None
    state = int(fits[torch.argmin(time[fits])])  # times fall strictly as bytes rise, so there is only one
    total, end = int(time[state]), int(held[state])
    found = []
    for policies, chosen, parent in reversed(trail):
        found.append(policies[int(chosen[state])])
        state = int(parent[state])
    return total, end, tuple(reversed(found))


def _undominated(held: torch.Tensor, time: torch.Tensor, chosen: torch.Tensor, cell: int) -> torch.Tensor:
    """Indices of the pairs (held, time) that no other beats, by rising bytes; at most :data:`STATES`."""
    order = torch.argsort(chosen, stable=True)
    order = order[torch.argsort(time[order], stable=True)]
    order = order[torch.argsort(held[order], stable=True)]
    times = time[order]
    best = torch.cummin(times, 0).values
    first = torch.ones_like(times, dtype=torch.bool)
    first[1:] = times[1:] < best[:-1]
    order = order[first]
    if len(order) > STATES:
        cells = held[order] // cell
        last = torch.ones_like(cells, dtype=torch.bool)
        last[:-1] = cells[1:] != cells[:-1]  # the fastest of each cell
        last[0] = True  # and the smallest of all, so that what fits is always found
        order = order[last]
    return order


def least_budget(
    layers: Sequence[LayerCosts],
    fixed_bytes: int | Mapping[str, int],
    *,
    head_peak: int = 0,
    accumulating: bool = True,
    host_budget: int | None = None,
    context: int = 0,
    reserve: Reserve = NOTHING,
) -> int:
    """The smallest budget, in bytes, for which :func:`solve` finds a plan. The arguments are those of ``solve``."""
    always = fixed_bytes if isinstance(fixed_bytes, int) else sum(fixed_bytes.values())
    needs = [shared + _least_room(choice, head_peak, accumulating) for choice, shared in choices(layers, host_budget)]
    allocated = always + min(needs)
    return allocated + reserve.beside(allocated) + context + 1


def _least_room(layers: Sequence[LayerCosts], head_peak: int, accumulating: bool) -> int:
    """The lowest peak that any choice has, by bisection: whether a room suffices, a greedy choice tells."""
    later = gradients_after(layers, accumulating)
    everything = sum(layer.gradients for layer in layers)
    at_forward = everything if accumulating else 0

    def suffices(room: int) -> bool:
        held = 0
        for i, layer in enumerate(layers):
            fitting = [
                cost.saved
                for cost in layer.policies.values()
                if held + max(cost.forward_peak + at_forward, cost.backward_peak + later[i]) <= room
            ]
            if not fitting:
                return False
            held += min(fitting)
        return held + head_peak + at_forward <= room and everything <= room

    low, high = -1, 0
    while not suffices(high):
        low, high = high, 2 * high + 1
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


def _error(
    fixed: Mapping[str, int],
    budget: int,
    least: int,
    context: int,
) -> DoesNotFit:
    always = sum(fixed.values()) + context
    large = {name: size for name, size in {**fixed, "CUDA context": context}.items() if size > SMALL * always}
    named = ", ".join(f"{name} {gib(size)}" for name, size in large.items())
    named = f" ({named})" if named else ""
    if always > budget:
        why = f"what is there before the first step is {gib(always)} alone{named}"
    else:
        why = f"the least that a step needs is {gib(least)}, of which {gib(always)} are there before it{named}"
    return DoesNotFit(
        f"fastplug: a budget of {gib(budget)} is too small: {why}; give a larger budget, a shorter sequence, a smaller "
        "batch or a smaller format of the weights",
        least,
    )
