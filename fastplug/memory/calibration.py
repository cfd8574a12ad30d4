"""Measuring in the first steps what was reasoned from shapes, and the numbers that a plan then follows from.

Times come from pairs of events in the device's own stream, which are read a step later, when the device has passed
them: nothing waits. Sizes come from the allocator's counter around a layer's forward. Both are kept as ratios of
measured to reasoned, one for each policy, so that they hold for every layer and every shape, are few enough to be
agreed on by all ranks, and are saved with the plans.

What copies to the host's memory cost cannot be told from a plan that copies: the layers beside them are slower by 3% at
some times and by 18% at others. So some early forwards follow a plan without copies, which gives the same bits: layers
are measured there, and whole steps of both kinds are compared (``steps.py``).
"""

from __future__ import annotations

import statistics
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from fastplug.memory.costs import LayerCosts, PolicyCost
from fastplug.memory.estimate import SLACK
from fastplug.memory.meter import Mark, Meter
from fastplug.memory.plan import Plan, Shape
from fastplug.memory.policy import SPREAD, Policy
from fastplug.memory.reserve import Reserve
from fastplug.memory.steps import WITHOUT, Steps

FORWARDS = 3  # observed of each shape, after the first: that one compiles and warms up
# How much higher the ratio of a policy may be than the lowest one. In quiet runs on an H200 nearly all were within 6%.
# A host that was slow for a while made them 1.3 and 1.7 times as high, so that layers were computed again though there
# was room. What copies cost in truth is for whole steps to say.
ALIKE = 1.05
NEAR = 0.05  # a ratio that moves by less says the same
COPY_NEAR = 0.1  # likewise of copies to the host's memory
HOST_NEAR = 0.25  # of the host's free memory: what data loaders and other processes take comes and goes


@dataclass(frozen=True)
class Agreed:
    """What all ranks plan from. Equal numbers and an equal shape give an equal plan, in one process up to a gain of 1%,
    for which the plan before is not left.

    Attributes:
        available: Bytes of reserved memory plus the CUDA context that a step may take.
        context: Bytes of the CUDA context.
        fixed: Bytes that are there before the first layer's forward, gradients and what recorded layers hold left out,
            and those that an optimizer's states will take.
        extra: Bytes that the highest mark was above (below, if negative) what had been predicted.
        slack: What is reserved beyond the allocated, as a fraction of it.
        weights: Bytes of weights, buffers included.
        host: Bytes of host memory that may be pinned.
        accumulating: Whether gradients of an earlier micro-batch are there in the forward.
        live: How many forwards wait for their backward at a time.
        copy: Measured over assumed milliseconds of copies to the host's memory.
        copies: Whether layers may copy to the host's memory at all, if what is asked fits without.
        caution: Bytes that the first plans leave unused where they can: kernels are still being loaded, and the
            allocator has yet to find blocks of the right sizes.
        assumed: Bytes of ``fixed`` that are states of an optimizer nobody has seen: it may have smaller ones, or none.
        ms: Policy -> measured over reasoned milliseconds.
        saved: Likewise of the bytes that a layer keeps.
    """

    available: int
    context: int
    fixed: int
    extra: int = 0
    slack: float = SLACK
    weights: int = 0
    host: int = 0
    accumulating: bool = False
    live: int = 1
    copy: float = 1.0
    copies: bool = True
    caution: int = 0
    assumed: int = 0
    ms: dict[Policy, float] = field(default_factory=dict)
    saved: dict[Policy, float] = field(default_factory=dict)

    @property
    def reserve(self) -> Reserve:
        """What is reserved beyond the allocated."""
        return Reserve.of(self.slack, self.weights)

    @property
    def fingerprint(self) -> int:
        """A number that other numbers would change; never 0."""
        return zlib.crc32(repr(self).encode()) + 1

    def differs(self, other: Agreed) -> bool:
        """Whether plans from ``other`` may be worth making; small changes are noise."""
        if (self.accumulating, self.live, self.copies) != (other.accumulating, other.live, other.copies):
            return True
        room = self.available // 100
        sizes = ("available", "context", "fixed", "extra", "caution", "assumed")
        if any(abs(getattr(self, name) - getattr(other, name)) > room for name in sizes):
            return True
        if abs(self.host - other.host) > max(room, HOST_NEAR * other.host):
            return True
        if abs(self.slack - other.slack) > 0.005 or abs(self.copy / other.copy - 1) > COPY_NEAR:
            return True
        for mine, theirs in ((self.ms, other.ms), (self.saved, other.saved)):
            if mine.keys() != theirs.keys() or any(abs(mine[p] / theirs[p] - 1) > NEAR for p in mine):
                return True
        return False

    def apply(self, layers: Sequence[LayerCosts]) -> tuple[LayerCosts, ...]:
        """The costs with the measured ratios, for as many forwards as wait at a time."""
        mean = statistics.fmean(self.ms.values()) if self.ms else 1.0
        made: dict[int, LayerCosts] = {}
        for layer in layers:
            if id(layer) in made:
                continue
            costs = {}
            for policy, cost in layer.policies.items():
                saved = int(cost.saved * self.saved.get(policy, 1.0))
                more, others = saved - cost.saved, saved * (self.live - 1)
                ratio = self.ms.get(policy, mean)
                costs[policy] = replace(
                    cost,
                    ms=cost.ms * ratio,
                    forward_ms=cost.forward_ms * ratio,
                    copy_ms=cost.copy_ms * self.copy,
                    saved=saved + others,
                    forward_peak=cost.forward_peak + more + others,
                    backward_peak=max(cost.backward_peak + more, saved) + others,
                    host=cost.host * self.live,
                )
            made[id(layer)] = replace(layer, policies=costs)
        return tuple(made[id(layer)] for layer in layers)


class Observation:
    """One layer's forward and backward, as they are measured."""

    def __init__(self, meter: Meter, policy: Policy, cost: PolicyCost, copying: bool, aside: Callable[[], int]) -> None:
        self._meter, self.policy, self.cost, self.copying, self._aside = meter, policy, cost, copying, aside
        self._before = meter.allocated() - aside()
        self._marks: list[Mark] = [meter.mark()]
        self.saved: int | None = None

    def forward_done(self) -> None:
        self._marks.append(self._meter.mark())
        if not self.policy.offloads:  # the caller still holds what was copied
            self.saved = self._meter.allocated() - self._aside() - self._before

    def backward(self, begins: bool) -> None:
        self._marks.append(self._meter.mark())

    def ms(self) -> float | None:
        """Forward and backward together, or None while they are not done."""
        if len(self._marks) != 4:
            return None
        parts = [self._marks[i + 1].milliseconds_since(self._marks[i]) for i in (0, 2)]
        return None if None in parts else sum(part for part in parts if part is not None)


def _lowest_quarter(ratios: Sequence[float]) -> float:
    return sorted(ratios)[(len(ratios) - 1) // 4]


class Timed(NamedTuple):
    """What an observation said."""

    policy: Policy
    cost: PolicyCost
    ms: float

    @property
    def ratio(self) -> float:
        """Measured over reasoned milliseconds."""
        reasoned = self.cost.ms
        if self.policy is not SPREAD:  # for whose copies nothing waits
            reasoned += self.cost.waiting()
        return self.ms / reasoned


class Calibration:
    """What was observed on this rank.

    Attributes:
        watching: Whether the present forward is observed.
        steps: How long whole steps took.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._seen: dict[Shape, int] = defaultdict(int)
        self._open: list[Observation] = []
        self._times: dict[bool, list[Timed]] = {False: [], True: []}  # by whether the forward copied
        self._saved: dict[Policy, list[float]] = defaultdict(list)
        self._shape: Shape = (0, 0)
        self._copying = False
        self.watching = False
        self.steps = Steps(meter)

    def begin(self, shape: Shape) -> bool:
        """A forward of this shape begins: read what the device has passed, and decide whether to observe this one.

        Returns whether the step before followed the plan of the one before that.
        """
        settled = self.steps.begin()
        waiting = []
        for observation in self._open:
            ms = observation.ms()
            if ms is None:
                waiting.append(observation)
                continue
            self._note(observation, ms)
        self._open = waiting[-512:]  # forwards without a backward are forgotten
        self._seen[shape] += 1
        self._shape, self._copying = shape, False
        self.watching = 1 < self._seen[shape] <= 1 + FORWARDS
        return settled

    def compares(self) -> bool:
        """Whether the present forward is to follow a plan without copies, if the one for its shape copies."""
        return self._seen[self._shape] in WITHOUT

    def follow(self, plan: Plan, instead: bool) -> None:
        """The plan that the present forward follows, and whether it is one without copies ``instead`` of another."""
        self._copying = plan.host_bytes > 0
        self.watching |= instead
        self.steps.follow(plan)

    def observe(self, policy: Policy, cost: PolicyCost, aside: Callable[[], int] = lambda: 0) -> Observation | None:
        """Measure a layer's forward that begins now, if this forward is one to observe.

        Args:
            policy: What the layer keeps.
            cost: What that was reasoned to cost.
            aside: Tells how many bytes are allocated for something else that may come or go meanwhile.
        """
        if not self.watching:
            return None
        observation = Observation(self._meter, policy, cost, self._copying, aside)
        self._open.append(observation)
        return observation

    def disturbed(self) -> None:
        """Memory ran out: what is being observed tells of that, not of layers."""
        self._open.clear()
        self.steps.disturbed()

    def _note(self, observation: Observation, ms: float) -> None:
        cost = observation.cost
        if cost.ms > 0 and ms > 0:
            self._times[observation.copying].append(Timed(observation.policy, cost, ms))
        if observation.saved is not None and observation.saved > 0 and cost.saved > 0:
            self._saved[observation.policy].append(observation.saved / cost.saved)

    def ms(self) -> dict[Policy, float]:
        """Policy -> measured over reasoned milliseconds, over layers and steps: of policies that do not copy those
        without copies, where there are any.

        A layer is measured as slower than it is where it waits for Python or for its neighbours' copies, and never as
        faster: so it is the lowest quarter that counts. And policies run the same kernels, so that what one has beyond
        :data:`ALIKE` of the others was such waiting, too.
        """
        plain, beside = _by_policy(self._times[False]), _by_policy(self._times[True])
        ratios = {policy: times for policy, times in beside.items() if policy.offloads or not plain} | plain
        found = {policy: _lowest_quarter(each) for policy, each in ratios.items()}
        computed = [ratio for policy, ratio in found.items() if not policy.offloads]
        if not computed:
            return found
        least = min(computed)
        return {policy: min(ratio, least * ALIKE) for policy, ratio in found.items()}

    def saved(self) -> dict[Policy, float]:
        """Policy -> measured over reasoned bytes."""
        return {policy: statistics.median(found) for policy, found in self._saved.items()}


def _by_policy(times: Iterable[Timed]) -> dict[Policy, list[float]]:
    found: dict[Policy, list[float]] = defaultdict(list)
    for time in times:
        found[time.policy].append(time.ratio)
    return found


__all__ = ["Agreed", "Calibration", "Observation"]
