"""The fastest choice of policies that fits a budget.

When the backward begins, every layer holds what its policy keeps; layer by layer this is freed again, the last one
first. So with ``before(i)`` the sum of ``saved`` over the layers before layer i, the step's peak is the highest of

* ``before(i) + forward_peak(i)`` and ``before(i) + backward_peak(i)`` of every layer i,
* ``before(L) + head_peak``, while head and loss run,
* everything with all gradients, while the optimizer runs.

A layer that recomputes everything has, in its own backward, as much in memory as one that kept everything. So keeping
all of the *last* layer costs nothing at the peak, and of equal layers the later ones keep more: what they hold lives
for the shortest time.

This is a multiple-choice knapsack with a constraint at every prefix. It is solved exactly by dynamic programming over
the pairs (bytes held, picoseconds) that no other pair beats in both (Nemhauser & Ullmann 1969).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from fastplug.errors import OptionError
from fastplug.memory.costs import LayerCosts, PolicyCost
from fastplug.memory.plan import Plan
from fastplug.memory.policy import Policy

STATES = 16384
"""Undominated pairs that are followed. 32 equal layers have about 2,000; where there are more, neighbours are merged,
which may cost up to a 16384th of the budget per layer but never exceeds it."""


SPREAD = Policy.OFFLOAD_KEEP
COPYING = 0.9
"""Share of the computation's time that copies beside it may take."""


class Peak(NamedTuple):
    """The highest bytes of a step above what is always there, and of these what layers hold and what gradients take."""

    bytes: int
    held: int
    gradients: int
    moment: str


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
    slack: float = 0.0,
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
        slack: Reserved bytes beyond the allocated ones, as a fraction of these.
        other_ms: Milliseconds of the step outside the layers.
        batch, sequence: The shape that this plan is for.

    Of plans that take equally long the one that holds least is taken, of those that hold equally much the one whose
    late layers keep most. The same input always gives the same plan.

    Raises:
        DoesNotFit: Not even the least choice fits; the message has the numbers.
    """
    fixed = {"fixed": fixed_bytes} if isinstance(fixed_bytes, int) else dict(fixed_bytes)
    always = sum(fixed.values())
    room = int((budget - context) / (1 + slack)) - always
    best: tuple[int, int, tuple[Policy, ...]] | None = None
    for choice, shared in _choices(layers, host_budget):
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
            slack=slack,
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
        slack=slack,
        other_ms=other_ms,
        batch=batch,
        sequence=sequence,
    )


def assemble(
    layers: Sequence[LayerCosts],
    policies: Sequence[Policy],
    fixed_bytes: int | Mapping[str, int],
    budget: int,
    *,
    head_peak: int = 0,
    accumulating: bool = True,
    context: int = 0,
    slack: float = 0.0,
    other_ms: float = 0.0,
    batch: int = 0,
    sequence: int = 0,
) -> Plan:
    """What a given choice of policies needs, whether or not it fits. The arguments are those of :func:`solve`."""
    fixed = {"fixed": fixed_bytes} if isinstance(fixed_bytes, int) else dict(fixed_bytes)
    peak = peak_of(layers, policies, head_peak=head_peak, accumulating=accumulating)
    workspace = peak.bytes - peak.gradients - peak.held
    parts = {**fixed, "gradients": peak.gradients, "activations": peak.held, "workspace": workspace}
    parts["slack"] = int(sum(parts.values()) * slack)
    parts["context"] = context
    chosen = [layer[policy] for layer, policy in zip(layers, policies, strict=True)]
    return Plan(
        policies=tuple(policies),
        batch=batch,
        sequence=sequence,
        budget=budget,
        parts=parts,
        ms=other_ms + sum(cost.ms for cost in chosen) + _waiting(chosen, policies),
        host_bytes=sum(cost.host for cost in chosen),
        moment=peak.moment,
        logits=head_peak,
    )


OPTIMIZER = "the optimizer's step"
HEAD = "head and loss"


def peak_of(
    layers: Sequence[LayerCosts], policies: Sequence[Policy], *, head_peak: int = 0, accumulating: bool = True
) -> Peak:
    """The peak of a step, gradients included, above the bytes that are always there."""
    chosen = [layer[policy] for layer, policy in zip(layers, policies, strict=True)]
    later = _gradients_after(layers, accumulating)
    all_gradients = sum(layer.gradients for layer in layers)
    at_forward = all_gradients if accumulating else 0
    shared = sum({policy: cost.shared for policy, cost in zip(policies, chosen)}.values())
    peaks = [Peak(all_gradients + shared, 0, all_gradients, OPTIMIZER)]
    before = shared
    for i, cost in enumerate(chosen):
        forward, backward = before + cost.forward_peak + at_forward, before + cost.backward_peak + later[i]
        peaks.append(Peak(forward, before, at_forward, f"the forward of layer {i}"))
        peaks.append(
            Peak(backward, min(before + cost.saved, backward - later[i]), later[i], f"the backward of layer {i}")
        )
        before += cost.saved
    peaks.append(Peak(before + head_peak + at_forward, before, at_forward, HEAD))
    return max(peaks, key=lambda peak: peak.bytes)


def _waiting(chosen: Sequence[PolicyCost], policies: Sequence[Policy]) -> float:
    """Milliseconds that a step waits for copies to the host's memory and back."""
    spread = [i for i, policy in enumerate(policies) if policy is SPREAD]
    every = min((after - before for before, after in itertools.pairwise(spread)), default=len(policies))
    return sum(cost.waiting(every if policy is SPREAD else 1) for cost, policy in zip(chosen, policies))


def _gradients_after(layers: Sequence[LayerCosts], accumulating: bool) -> list[int]:
    """Bytes of gradients that are there when each layer's backward runs, its own included."""
    if accumulating:
        return [sum(layer.gradients for layer in layers)] * len(layers)
    sums = list(itertools.accumulate(layer.gradients for layer in reversed(layers)))
    return sums[::-1]


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


def _choices(layers: Sequence[LayerCosts], host_budget: int | None) -> list[tuple[list[LayerCosts], int]]:
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


def _search(
    layers: Sequence[LayerCosts], room: int, head_peak: int, accumulating: bool
) -> tuple[int, int, tuple[Policy, ...]] | None:
    """(picoseconds, bytes held at the end, policies) of the best choice, or None."""
    order = list(Policy)
    later = _gradients_after(layers, accumulating)
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
    slack: float = 0.0,
) -> int:
    """The smallest budget, in bytes, for which :func:`solve` finds a plan. The arguments are those of ``solve``."""
    always = fixed_bytes if isinstance(fixed_bytes, int) else sum(fixed_bytes.values())
    needs = [shared + _least_room(choice, head_peak, accumulating) for choice, shared in _choices(layers, host_budget)]
    return math.ceil((always + min(needs)) * (1 + slack)) + context + 1


def _least_room(layers: Sequence[LayerCosts], head_peak: int, accumulating: bool) -> int:
    """The lowest peak that any choice has, by bisection: whether a room suffices, a greedy choice tells."""
    later = _gradients_after(layers, accumulating)
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

    def gib(size: float) -> str:
        return f"{size / 2**30:.2f} GiB"

    large = {name: size for name, size in {**fixed, "CUDA context": context}.items() if size >= 2**23}
    named = ", ".join(f"{name} {gib(size)}" for name, size in large.items())
    if always > budget:
        why = f"what is there before the first step is {gib(always)} alone ({named})"
    else:
        why = f"the least that a step needs is {gib(least)}, of which {gib(always)} are there before it ({named})"
    return DoesNotFit(
        f"fastplug: a budget of {gib(budget)} is too small: {why}; give a larger budget, a shorter sequence, a smaller "
        "batch or a smaller format of the weights",
        least,
    )
