"""What observed times make of reasoned ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from fastplug.memory.calibration import ALIKE, Agreed, Calibration
from fastplug.memory.costs import PolicyCost
from fastplug.memory.plan import Plan
from fastplug.memory.policy import Policy

REASONED = 10.0  # milliseconds of a layer


class Mark:
    def __init__(self, at: float) -> None:
        self.at = at

    def milliseconds_since(self, earlier: Mark) -> float:
        return self.at - earlier.at


class Device:
    def allocated(self) -> int:
        return 0

    def mark(self) -> Any:
        return Mark(0.0)


def measured(times: dict[Policy, Iterable[float]]) -> dict[Policy, float]:
    """The ratios after a forward and a backward of layers that took so long, together, under each policy."""
    calibration = Calibration(Device())  # type: ignore[arg-type]
    for _ in range(2):
        calibration.begin((1, 64))
    for policy, found in times.items():
        for ms in found:
            cost = PolicyCost(0, 0, 0, REASONED, 0, 0, REASONED / 3, 0.0)
            observation = calibration.observe(policy, cost)
            assert observation is not None
            observation._marks = [Mark(at) for at in (0.0, ms / 3, 100.0, 100.0 + 2 * ms / 3)]
    calibration.begin((1, 64))
    return calibration.ms()


def test_layers_that_waited_do_not_count() -> None:
    found = measured({Policy.KEEP: [10.5, 17.0, 18.0, 10.4, 25.0, 10.6, 30.0, 16.0]})
    assert found == {Policy.KEEP: pytest.approx(1.05)}


def test_a_policy_that_waited_throughout_is_held_to_the_others() -> None:
    slow = measured({Policy.KEEP: [17.4] * 4, Policy.DROP_GATE_UP: [13.7] * 4, Policy.OFFLOAD_KEEP: [22.5] * 4})
    assert slow[Policy.DROP_GATE_UP] == pytest.approx(1.37)
    assert slow[Policy.KEEP] == pytest.approx(1.37 * ALIKE)
    assert slow[Policy.OFFLOAD_KEEP] == pytest.approx(1.37 * ALIKE)


def test_what_differs_a_little_stays_as_measured() -> None:
    times = {Policy.KEEP: [10.4] * 3, Policy.DROP_GATE_UP: [10.6] * 3, Policy.OFFLOAD_KEEP: [10.9] * 3}
    assert measured(times) == {policy: pytest.approx(found[0] / REASONED) for policy, found in times.items()}
    assert measured({Policy.OFFLOAD_KEEP: [30.0]}) == {Policy.OFFLOAD_KEEP: pytest.approx(3.0)}
    assert measured({}) == {}


def test_policies_are_measured_where_they_are_by_themselves() -> None:
    """What does not copy is measured in forwards without copies once there are any, what copies in the others."""
    calibration, cost = Calibration(Device()), PolicyCost(0, 0, 0, REASONED, 0, 0, REASONED / 3)  # type: ignore[arg-type]
    plan = Plan((Policy.KEEP,), 1, 64, 100, {}, 10.0)

    def ratios(host_bytes: int, times: dict[Policy, float]) -> dict[Policy, float]:
        for _ in range(2):
            calibration.begin((1, 64))
            calibration.follow(replace(plan, host_bytes=host_bytes), instead=not host_bytes)
        for policy, ms in times.items():
            observation = calibration.observe(policy, cost)
            assert observation is not None
            observation._marks = [Mark(at) for at in (0.0, ms / 3, 100.0, 100.0 + 2 * ms / 3)]
        calibration.begin((1, 64))
        return calibration.ms()

    copying = Policy.OFFLOAD_ATTENTION
    found = ratios(1, {Policy.KEEP: 11.2, copying: 11.6})
    assert found == {Policy.KEEP: pytest.approx(1.12), copying: pytest.approx(11.6 / (REASONED + cost.waiting()))}
    found = ratios(0, {Policy.KEEP: 11.1})
    assert found == {Policy.KEEP: pytest.approx(1.11), copying: pytest.approx(11.6 / (REASONED + cost.waiting()))}


def test_numbers_that_move_make_new_plans() -> None:
    agreed = Agreed(available=100, context=1, fixed=10)
    assert not agreed.differs(replace(agreed, copy=1.01, available=101))
    assert agreed.differs(replace(agreed, copies=False))
    assert agreed.differs(replace(agreed, available=110))
