"""Plans and CUDA graphs: layers are recorded where what recordings hold fits the budget, and it is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastplug
from fastplug.graphs import recorder, replay
from fastplug.memory import recordings
from fastplug.memory.policy import Policy
from fastplug.memory.runtime import planners
from fastplug.patching.sites import KEY
from tests import models
from tests.engine.graphs_on_cpu import CPURecorder
from tests.memory.device import Device, MiB, gradients, same_bits
from tests.memory.under import layers

pytest.importorskip("peft")

LAYERS = 4
SHORT, LONG = models.batch(2, 60), models.batch(2, 250)


@pytest.fixture(autouse=True)
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (replay, recorder):
        monkeypatch.setattr(module, "recorder_for", lambda device: CPURecorder())


class Holding(Device):
    """A device on which what recordings hold is allocated, as on a GPU."""

    planner: Any = None

    def allocated(self) -> int:
        return super().allocated() + sum(self.planner.recordings.held().values())


def planned(memory: str, **options: Any) -> tuple[Any, Any]:
    model = models.lora(models.plain(num_hidden_layers=LAYERS))
    fastplug.apply(model, memory=memory, **options)
    (planner,) = planners(model)
    planner.meter = device = Holding(model, 64 * MiB)
    device.planner = planner
    return model, planner


def graphs(model: Any) -> set[str]:
    states = [layer.__dict__[KEY].graphs for layer in layers(model)]
    return {type(graph).__name__ for state in states if state for known in state.graphs.values() for graph in known}


FULL = 0.9


@pytest.fixture(autouse=True)
def without_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in for recordings here leaves no memory unused between them."""
    monkeypatch.setattr(recordings, "FULL", FULL)


@pytest.fixture(scope="module")
def wanted() -> list[dict[str, torch.Tensor]]:
    model = models.lora(models.plain(num_hidden_layers=LAYERS))
    fastplug.apply(model, graphs="off")
    return [gradients(model, SHORT), gradients(model, LONG)]


def near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """Recordings are padded, so sums are in another order."""
    return all(torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6) for name in wanted)


def test_layers_are_recorded_where_that_fits_and_the_plan_stays(wanted: list[dict[str, torch.Tensor]]) -> None:
    model, planner = planned("5MiB")
    plans, fixed = [], []
    for _ in range(9):
        assert near(gradients(model, SHORT), wanted[0])
        plans.append(planner.plan.policies)
        fixed.append(planner.agreed.fixed)
        assert planner.records
    assert graphs(model) == {"KeptGraph"}
    assert set(plans) == {(Policy.KEEP,) * LAYERS}
    assert planner.plan.budget / 2 < planner.plan.total <= FULL * planner.plan.budget
    assert len(set(fixed[1:])) == 1  # what recordings hold is no part of it
    assert sum(planner.recordings.held().values()) > MiB
    assert not fastplug.report(model).notes


def test_in_a_smaller_budget_they_are_recorded_and_keep_less(wanted: list[dict[str, torch.Tensor]]) -> None:
    model, planner = planned("3MiB")
    for _ in range(4):
        assert near(gradients(model, SHORT), wanted[0])
    assert "CheckpointedGraph" in graphs(model)
    assert planner.plan.total <= FULL * planner.plan.budget
    assert sum(planner.recordings.held().values()) > 0


def test_where_recordings_do_not_fit_nothing_is_recorded(wanted: list[dict[str, torch.Tensor]]) -> None:
    model, planner = planned("2MiB")
    for _ in range(4):
        assert same_bits(gradients(model, SHORT), wanted[0])
    assert graphs(model) == set()
    assert planner.plan.total <= planner.plan.budget


def test_other_shapes_find_what_recordings_hold_taken(wanted: list[dict[str, torch.Tensor]]) -> None:
    model, planner = planned("9MiB")
    gradients(model, LONG)
    before = planner.plan
    for _ in range(4):
        gradients(model, SHORT)
    held = planner.recordings.held()[2, 64]
    assert near(gradients(model, LONG), wanted[1])
    assert planner.plan.parts["recorded layers of other shapes"] == held
    assert planner.plan.total <= planner.plan.budget
    assert before.parts.get("recorded layers of other shapes") is None


def test_recordings_are_given_up_where_another_batch_needs_their_memory(wanted: list[dict[str, torch.Tensor]]) -> None:
    model, planner = planned("5800KiB")
    for _ in range(4):
        gradients(model, SHORT)
    assert graphs(model)
    longer = models.batch(4, 250)
    gradients(model, longer)
    assert graphs(model) == set()
    (note,) = fastplug.report(model).notes
    assert "not replayed as CUDA graphs any more" in note
    assert planner.plan.total <= planner.plan.budget
    for _ in range(4):
        assert same_bits(gradients(model, SHORT), wanted[0])
    assert graphs(model) == set()  # or each would take the other's memory in turn


def test_graphs_can_be_off() -> None:
    model, planner = planned("9MiB", graphs="off")
    for _ in range(4):
        gradients(model, SHORT)
    assert not planner.records
    assert graphs(model) == set()
