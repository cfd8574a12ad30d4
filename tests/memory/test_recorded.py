"""Policies and recorded layers: one that is computed again is replayed, one whose input is offloaded is not."""

from __future__ import annotations

import copy

import pytest
import torch

import fastplug
from fastplug.graphs import replay
from fastplug.memory import offload
from fastplug.memory.policy import Policy
from fastplug.patching.sites import KEY
from tests import models
from tests.engine.graphs_on_cpu import CPURecorder
from tests.engine.test_graphs import agree, batch, train
from tests.memory.under import layers, under

pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def recorder(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 1)
    if device.type == "cpu":
        monkeypatch.setattr(replay, "recorder_for", lambda device: CPURecorder())


@pytest.mark.parametrize("policy", Policy)
def test_training_is_the_same(device: torch.device, policy: Policy) -> None:
    eager = models.lora(models.plain("llama")).to(device)
    replayed = copy.deepcopy(eager)
    fastplug.apply(eager, graphs="off")
    fastplug.apply(replayed, graphs="on")
    under(replayed, policy, 50 if policy is Policy.RESIDUAL else None)
    batches = [batch(device, seed=i) for i in range(5)]
    assert train(replayed, batches) == pytest.approx(train(eager, batches), rel=1e-5)
    agree(eager, replayed)
    states = [layer.__dict__[KEY].graphs for layer in layers(replayed)]
    graphs = [graph for state in states if state for known in state.graphs.values() for graph in known]
    kind = "CheckpointedGraph" if policy.checkpoints else "KeptGraph"
    assert {type(graph).__name__ for graph in graphs} == (set() if policy.offloads else {kind})
