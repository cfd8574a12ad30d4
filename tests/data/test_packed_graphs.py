"""Recorded layers and packed rows: a recording of plain rows is never replayed for rows of documents."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastplug
from fastplug.data import PaddingFreeCollator
from fastplug.graphs import replay
from fastplug.graphs.layer_graph import KeptGraph
from fastplug.patching.sites import KEY
from tests import models
from tests.data.texts import documents, looks_for_documents, on
from tests.engine.graphs_on_cpu import CPURecorder
from tests.engine.test_graphs import batch, train

pytest.importorskip("peft")

LENGTHS = (30, 4, 1, 29)  # 64 tokens, as the plain batch has


@pytest.fixture(autouse=True)
def replays(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each replay of a layer."""
    if device.type == "cpu":
        monkeypatch.setattr(replay, "recorder_for", lambda device: CPURecorder())
    counted: list[int] = []
    forward = KeptGraph.forward

    def counting(self: KeptGraph, *args: Any) -> torch.Tensor:
        counted.append(1)
        return forward(self, *args)

    monkeypatch.setattr(KeptGraph, "forward", counting)
    return counted


@looks_for_documents
@pytest.mark.parametrize("attention", ["auto", "host"])
@pytest.mark.parametrize("told_by", ["cu_seqlens", "positions"])
def test_packed_rows_between_plain_ones(attention: str, told_by: str, device: torch.device, replays: list[int]) -> None:
    eager = models.lora(models.plain()).to(device)
    eager.config.use_cache = False
    replayed = copy.deepcopy(eager)
    fastplug.apply(eager, graphs="off", attention=attention)
    fastplug.apply(replayed, graphs="on", attention=attention)
    packed = on(device, PaddingFreeCollator(cu_seqlens=told_by == "cu_seqlens")(documents(LENGTHS)))
    plain = batch(device, 64, rows=1)
    mixed = [plain, plain, plain, packed, plain, packed, packed, packed, packed, plain]
    assert train(replayed, mixed) == pytest.approx(train(eager, mixed), rel=2e-5)
    states = [layer.__dict__[KEY].graphs for layer in replayed.get_base_model().model.layers]
    recorded = [key[6] for state in states for key in state.graphs if state.graphs[key]]
    # A mask of the host's, with its numbers, is an input of the recording; documents are not.
    host_mask = [(torch.bool, 1, 1)] if (attention, told_by) == ("host", "positions") else []
    assert recorded == [None, *host_mask] * 2
    assert len(replays) >= 2 * 3


def test_another_documents_mask_of_the_same_shape(device: torch.device) -> None:
    """Rows of one length with other bounds, one after another."""
    eager = models.lora(models.plain()).to(device)
    replayed = copy.deepcopy(eager)
    fastplug.apply(eager, graphs="off")
    fastplug.apply(replayed, graphs="on")
    all_lengths = [LENGTHS, LENGTHS[::-1], (64,), (1,) * 60 + (4,), (20, 44)] * 2
    batches = [on(device, PaddingFreeCollator()(documents(lengths))) for lengths in all_lengths]
    assert train(replayed, batches) == pytest.approx(train(eager, batches), rel=2e-5)
