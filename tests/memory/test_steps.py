"""What whole steps tell of copies to the host's memory."""

from __future__ import annotations

from collections.abc import Iterable

from fastplug.memory.plan import Plan, Shape
from fastplug.memory.policy import Policy
from fastplug.memory.steps import ENOUGH, LATEST, Steps
from tests.memory.device import Moment

SHAPE: Shape = (4, 128)
PLAIN, COPYING = (Policy.DROP_GATE_UP,), (Policy.OFFLOAD_KEEP,)


class Clock:
    """A device that tells the time: milliseconds, or None while it has not got there."""

    def __init__(self) -> None:
        self.now: float | None = 0.0

    def mark(self) -> Moment:
        self.latest = Moment(self.now)
        return self.latest


def run(steps: Steps, clock: Clock, kinds: Iterable[tuple[bool, float]], shape: Shape = SHAPE) -> None:
    """Steps of these kinds (whether they copy) and milliseconds, one after another."""
    for copies, ms in kinds:
        plan = Plan(COPYING if copies else PLAIN, *shape, 100, {}, 0.0, host_bytes=int(copies))
        steps.begin()
        steps.follow(plan)
        assert clock.now is not None
        clock.now += ms


def slower(*kinds: tuple[bool, float]) -> bool:
    clock = Clock()
    steps = Steps(clock)  # type: ignore[arg-type]
    run(steps, clock, kinds)
    steps.begin()
    return steps.slower_with_copies()


def test_the_median_of_settled_steps_counts() -> None:
    """The first step of a plan does not, nor one that something else delayed."""
    assert slower((False, 1.0), *[(False, 90.0)] * 3, (True, 1.0), (True, 100.0), (True, 300.0), (True, 110.0))
    assert not slower((False, 900.0), *[(False, 109.0)] * 3, (True, 900.0), (True, 110.0), (True, 300.0), (True, 110.0))
    assert not slower(*[(False, 99.0)] * 4, *[(True, 100.0)] * 4)  # by less than 2%


def test_some_steps_of_both_kinds_are_needed() -> None:
    for few in ([(False, 50.0)] * ENOUGH, []):
        assert not slower(*few, *[(True, 100.0)] * 8)
    assert not slower(*[(False, 50.0)] * 8, *[(True, 100.0)] * ENOUGH)
    assert not slower()


def test_the_latest_steps_count() -> None:
    plain, late = [(False, 90.0)] * 4, [(True, 100.0)] * (LATEST + 1)
    assert not slower(*plain, *[(True, 80.0)] * 40)
    assert slower(*plain, *[(True, 80.0)] * 40, *late)


def test_shapes_are_compared_with_themselves() -> None:
    clock = Clock()
    steps = Steps(clock)  # type: ignore[arg-type]
    run(steps, clock, [(False, 10.0)] * 4, (1, 64))
    run(steps, clock, [(True, 100.0)] * 4, (2, 64))
    steps.begin()
    assert not steps.slower_with_copies()
    run(steps, clock, [(False, 90.0)] * 4, (2, 64))
    steps.begin()
    assert steps.slower_with_copies()


def test_what_the_device_has_not_passed_is_read_later() -> None:
    clock = Clock()
    steps = Steps(clock)  # type: ignore[arg-type]
    run(steps, clock, [*[(False, 50.0)] * 4, *[(True, 100.0)] * 3])
    now, clock.now = clock.now, None
    steps.begin()
    last = clock.latest
    assert not steps.slower_with_copies()  # of two steps with copies one is over
    last.at = now
    steps.begin()
    assert steps.slower_with_copies()


def test_a_step_that_ran_out_of_memory_does_not_count() -> None:
    clock = Clock()
    steps = Steps(clock)  # type: ignore[arg-type]
    run(steps, clock, [(True, 100.0)] * 4)
    for _ in range(5):
        run(steps, clock, [(False, 10.0)])
        steps.disturbed()
    steps.begin()
    assert not steps.slower_with_copies()
