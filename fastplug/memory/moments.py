"""What a choice of policies needs: the bytes of a step's highest moment, and its milliseconds.

When the backward begins, every layer holds what its policy keeps; layer by layer this is freed again, the last one
first. So with ``before(i)`` the sum of ``saved`` over the layers before layer i, the step's peak is the highest of

* ``before(i) + forward_peak(i)`` and ``before(i) + backward_peak(i)`` of every layer i,
* ``before(L) + head_peak``, while head and loss run,
* everything with all gradients, while the optimizer runs.

A layer that recomputes everything has, in its own backward, as much in memory as one that kept everything. So keeping
all of the *last* layer costs nothing at the peak, and of equal layers the later ones keep more: what they hold lives
for the shortest time.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fastplug.memory.costs import LayerCosts, PolicyCost
from fastplug.memory.plan import Plan
from fastplug.memory.policy import SPREAD, Policy
from fastplug.memory.reserve import NOTHING, Reserve

OPTIMIZER = "the optimizer's step"
HEAD = "head and loss"


class Peak(NamedTuple):
    """The highest bytes of a step above what is always there, and of these what layers hold and what gradients take."""

    bytes: int
    held: int
    gradients: int
    moment: str


def assemble(
    layers: Sequence[LayerCosts],
    policies: Sequence[Policy],
    fixed_bytes: int | Mapping[str, int],
    budget: int,
    *,
    head_peak: int = 0,
    accumulating: bool = True,
    context: int = 0,
    reserve: Reserve = NOTHING,
    other_ms: float = 0.0,
    batch: int = 0,
    sequence: int = 0,
) -> Plan:
    """What a given choice of policies needs, whether or not it fits. The arguments are those of
    :func:`~fastplug.memory.solve.solve`."""
    fixed = {"fixed": fixed_bytes} if isinstance(fixed_bytes, int) else dict(fixed_bytes)
    peak = peak_of(layers, policies, head_peak=head_peak, accumulating=accumulating)
    workspace = peak.bytes - peak.gradients - peak.held
    parts = {**fixed, "gradients": peak.gradients, "activations": peak.held, "workspace": workspace}
    parts["slack"] = reserve.beside(sum(parts.values()))
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


def peak_of(
    layers: Sequence[LayerCosts],
    policies: Sequence[Policy],
    *,
    head_peak: int = 0,
    accumulating: bool = True,
    handed: Sequence[int] = (),
) -> Peak:
    """The peak of a step, gradients included, above the bytes that are always there.

    ``handed`` are bytes of decoded weights that the backward of each layer leaves to its next forward: both have them
    beside everything else.
    """
    chosen = [layer[policy] for layer, policy in zip(layers, policies, strict=True)]
    later = gradients_after(layers, accumulating)
    all_gradients = sum(layer.gradients for layer in layers)
    at_forward = all_gradients if accumulating else 0
    shared = sum({policy: cost.shared for policy, cost in zip(policies, chosen)}.values())
    peaks = [Peak(all_gradients + shared, 0, all_gradients, OPTIMIZER)]
    before, weights = shared, sum(handed)
    for i, cost in enumerate(chosen):
        forward = before + cost.forward_peak + at_forward + weights
        backward = before + cost.backward_peak + later[i] + weights
        weights -= handed[i] if handed else 0
        peaks.append(Peak(forward, before, at_forward, f"the forward of layer {i}"))
        held = min(before + cost.saved, backward - later[i])
        peaks.append(Peak(backward, held, later[i], f"the backward of layer {i}"))
        before += cost.saved
    peaks.append(Peak(before + head_peak + at_forward, before, at_forward, HEAD))
    return max(peaks, key=lambda peak: peak.bytes)


def may_hand_on(
    layers: Sequence[LayerCosts],
    policies: Sequence[Policy],
    handed: Sequence[int],
    *,
    head_peak: int = 0,
    accumulating: bool = True,
) -> int:
    """How many layers, from the first one on, may leave ``handed`` bytes to the next forward without a higher peak.

    The backward of the first layer is the last one: what it leaves is in the way of no other.
    """

    def peak(count: int) -> int:
        leave = [*handed[:count], *[0] * (len(layers) - count)]
        return peak_of(layers, policies, head_peak=head_peak, accumulating=accumulating, handed=leave).bytes

    return bisect.bisect_right(range(1, len(layers) + 1), peak(0), key=peak)  # it grows with the count


def _waiting(chosen: Sequence[PolicyCost], policies: Sequence[Policy]) -> float:
    """Milliseconds that a step waits for copies to the host's memory and back."""
    spread = [i for i, policy in enumerate(policies) if policy is SPREAD]
    every = min((after - before for before, after in itertools.pairwise(spread)), default=len(policies))
    return sum(cost.waiting(every if policy is SPREAD else 1) for cost, policy in zip(chosen, policies))


def gradients_after(layers: Sequence[LayerCosts], accumulating: bool) -> list[int]:
    """Bytes of gradients that are there when each layer's backward runs, its own included."""
    if accumulating:
        return [sum(layer.gradients for layer in layers)] * len(layers)
    sums = list(itertools.accumulate(layer.gradients for layer in reversed(layers)))
    return sums[::-1]


__all__ = ["Peak", "assemble", "gradients_after", "may_hand_on", "peak_of"]
