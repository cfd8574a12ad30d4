"""How long steps take with and without copies to the host's memory, whatever it is that makes them slow.

A layer's own time says little of that: copies pass beside layers, and Python needs longer to launch a layer that
copies, which costs nothing while the GPU has more to do and all of it where the host is slow. So it is whole steps that
are compared, from the begin of a forward to that of the next one, by the device's clock.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from typing import NamedTuple

from fastplug.memory.meter import Mark, Meter
from fastplug.memory.plan import Plan, Shape

WITHOUT = range(9, 13)  # forwards of a shape whose plan copies that follow one that does not, to be compared
LATEST = 8  # steps of either kind that count
ENOUGH = 2  # of either kind, for a comparison
FASTER = 0.98  # of the time with copies that steps without have to stay below


class Step(NamedTuple):
    """A step that has begun, and when."""

    at: Mark
    shape: Shape
    copies: bool
    settled: bool  # the plan is the one before: a new one unsettles the allocator


class Steps:
    """What was measured on this rank."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._begun: Mark | None = None  # when the present forward began
        self._now: Step | None = None
        self._done: deque[tuple[Step, Mark]] = deque(maxlen=64)  # that the device may not have passed yet
        self._plans: dict[Shape, Plan] = {}  # the last one of each shape
        self._ms: dict[bool, dict[Shape, deque[float]]] = {}
        for copies in (False, True):
            self._ms[copies] = defaultdict(lambda: deque(maxlen=LATEST))

    def begin(self) -> bool:
        """A forward begins, and with it a step: the one before is over. Whether that was a settled one."""
        now = self._begun = self._meter.mark()
        before, self._now = self._now, None
        settled = before is not None and before.settled
        if before is not None and settled:
            self._done.append((before, now))
        while self._done:
            step, end = self._done[0]
            ms = end.milliseconds_since(step.at)
            if ms is None:
                break
            self._ms[step.copies][step.shape].append(ms)
            self._done.popleft()
        return settled

    def follow(self, plan: Plan) -> None:
        """The forward that has begun follows this plan."""
        assert self._begun is not None
        shape = plan.batch, plan.sequence
        before = self._plans.get(shape)
        settled = before is not None and before.alike(plan)
        self._plans[shape] = plan
        self._now = Step(self._begun, shape, plan.host_bytes > 0, settled)

    def disturbed(self) -> None:
        """Memory ran out: the step tells of that."""
        self._now = None

    def latest(self, copies: bool) -> dict[Shape, list[float]]:
        """Milliseconds of the latest settled steps with copies or without, by shape."""
        return {shape: [*found] for shape, found in self._ms[copies].items()}

    def slower_with_copies(self) -> bool:
        """Whether steps are slower with copies than without, by the shapes that had both."""
        sums = [0.0, 0.0]
        others = self.latest(copies=True)
        for shape, plain in self.latest(copies=False).items():
            copying = others.get(shape, [])
            if min(len(plain), len(copying)) >= ENOUGH:
                sums[0] += statistics.median(plain)
                sums[1] += statistics.median(copying)
        return sums[0] < FASTER * sums[1]


__all__ = ["WITHOUT", "Steps"]
