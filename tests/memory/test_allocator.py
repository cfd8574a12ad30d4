"""The allocator's settings: made where a plan needs them, never against the user's own, and given back."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import pytest
import torch

import fastplug
from fastplug.memory import allocator
from fastplug.memory.allocator import Allocator
from fastplug.memory.runtime import planners
from tests import models

CPU = torch.device("cpu")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the allocator was told, in order."""
    found: list[str] = []
    monkeypatch.setattr(allocator, "_configure", found.append)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_expandable_segments_are_turned_on_once_and_off_again(asked: list[str]) -> None:
    one = Allocator(CPU, 2**30)
    assert asked == []
    assert one.expand()
    assert one.expand()
    assert asked == ["expandable_segments:True"]
    one.restore()
    one.restore()
    assert asked == ["expandable_segments:True", "expandable_segments:False"]
    assert one.expand()


def test_they_go_with_a_model_that_is_dropped(asked: list[str]) -> None:
    one = Allocator(CPU, 2**30)
    one.expand()
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None
    assert asked[-1] == "expandable_segments:False"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_settings_stay(asked: list[str], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "expandable_segments:False")
    assert not Allocator(CPU, 2**30).expand()
    assert asked == []
    monkeypatch.setenv(name, "garbage_collection_threshold:0.8")
    assert Allocator(CPU, 2**30).expand()
    assert asked[0] == "garbage_collection_threshold:0.8,expandable_segments:True"


def test_where_they_do_not_work_they_are_turned_off(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("CUDA driver error: operation not supported")

    monkeypatch.setattr(torch, "empty", fails)
    assert not Allocator(CPU, 2**30).expand()
    assert asked == ["expandable_segments:True", "expandable_segments:False"]


def test_another_allocator_is_left_alone(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert not Allocator(CPU, 2**30).expand()
    assert asked == []


def test_beside_vllm_they_stay_off(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert not Allocator(CPU, 2**30).expand()
    assert asked == []


@pytest.mark.gpu
def test_under_a_budget_that_is_filled_little_is_reserved_beyond_tensors() -> None:
    """The layers keep what they can. What is free in scattered pieces serves as one, so little of it is of no use."""
    model = models.lora(models.plain(hidden_size=1024, intermediate_size=3072, num_hidden_layers=6)).bfloat16().cuda()
    batch = {name: value.cuda() for name, value in models.batch(8, 2048).items()}
    applied = fastplug.apply(model, memory="keep", graphs="off")
    model(**batch).loss.backward()
    (planner,) = planners(model)
    assert planner.plan is not None
    budget = int(0.7 * planner.plan.total)
    applied.undo()
    torch.cuda.empty_cache()
    applied = fastplug.apply(model, memory=f"{budget}B", graphs="off")
    (planner,) = planners(model)
    for step in range(10):
        if step == 5:
            torch.cuda.reset_peak_memory_stats()
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
    assert planner.stock is not None
    assert planner.stock.meter.expand()
    assert torch.cuda.max_memory_reserved() <= 1.03 * torch.cuda.max_memory_allocated() + 2**26
    applied.undo()
    torch.cuda.empty_cache()  # which cuts what is left of expandable segments, so that they lie elsewhere then
    segments = torch.cuda.memory_snapshot()
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    new = [s for s in torch.cuda.memory_snapshot() if s["address"] not in {old["address"] for old in segments}]
    assert any(segment["total_size"] >= held.numel() for segment in new)
    assert not any(segment.get("is_expandable") for segment in new)
