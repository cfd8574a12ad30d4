"""How much host memory plans may pin: what is free and what is pinned already, shared by the ranks of a host."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import fastplug
from fastplug.memory import agreement, offload, stock
from fastplug.memory.runtime import planners
from tests import models
from tests.memory.device import Device, MiB, gradients, same_bits

pytest.importorskip("peft")

KiB = 1024
BATCH = models.batch(2, 250)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 1)
    for name in ("bytes", "host_memory", "offload"):
        monkeypatch.setattr(importlib.import_module(f"fastplug.memory.{name}"), "PIECE", 16 * KiB, raising=False)
    monkeypatch.setattr(stock, "RESERVE", 0)


def planned(memory: str, free: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A model and its planner, on a host with so many free bytes of which only offloading takes some."""
    model = models.lora(models.plain(num_hidden_layers=8))
    fastplug.apply(model, memory=memory)
    (planner,) = planners(model)
    planner.meter = Device(model, 64 * MiB)
    monkeypatch.setattr(stock, "host_available", lambda: free - planner._pinned_bytes())
    return model, planner


def test_what_is_pinned_does_not_count_as_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, planner = planned("4MiB", 4000 * KiB, monkeypatch)
    for forward in range(4):
        gradients(model, BATCH)
        if forward == 0:
            assert planner.plan.host_bytes == planner._pinned_bytes()  # in whole pieces
        assert planner.agreed.host == pytest.approx(3200 * KiB, abs=8)
        assert 0 < planner.plan.host_bytes <= planner._pinned_bytes()
    assert not fastplug.report(model).notes


def test_the_least_that_layers_can_keep_is_within_the_host_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fits, so the step goes on with the least: not with more of the host's memory than there is."""
    plain = models.lora(models.plain(num_hidden_layers=8))
    fastplug.apply(plain)
    model, planner = planned("4MiB", 1100 * KiB, monkeypatch)
    gradients(model, BATCH)
    longer = models.batch(2, 380)
    found = gradients(model, longer)
    assert any("goes on with the least" in note for note in fastplug.report(model).notes)
    assert not planner.plan.fits
    assert 0 < planner.plan.host_bytes <= planner.agreed.host
    assert planner._pinned_bytes() <= 1100 * KiB
    assert same_bits(found, gradients(plain, longer))


def test_ranks_of_one_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "host_available", lambda: 8000 * KiB)
    assert stock.Stock._host(0) == 6400 * KiB
    assert stock.Stock._host(1000 * KiB) == 7200 * KiB
    monkeypatch.setattr(agreement, "ranks_here", lambda: 8)
    assert stock.Stock._host(0) == 800 * KiB
    monkeypatch.setattr(stock, "host_available", lambda: 0)  # all eight have pinned what they may
    assert stock.Stock._host(1000 * KiB) == 800 * KiB
    monkeypatch.setattr(stock, "host_available", lambda: None)
    assert stock.Stock._host(0) == 0


@pytest.mark.parametrize(
    ("said", "devices", "wanted"),
    [
        ({"LOCAL_WORLD_SIZE": "4"}, 0, 4),
        ({"LOCAL_SIZE": "2"}, 8, 2),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, 0, 8),
        ({"SLURM_NTASKS_PER_NODE": "8(x2)"}, 8, 8),  # not a number, so the devices count
        ({}, 8, 8),
        ({}, 1, 16),  # each rank sees a GPU of its own, and all may be on one host
    ],
)
def test_how_many_ranks_a_host_runs(
    said: dict[str, str], devices: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in agreement.LOCAL:
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert agreement.ranks_here() == 1  # a process alone, whatever an interactive job of Slurm's says
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    assert agreement.ranks_here() == wanted
