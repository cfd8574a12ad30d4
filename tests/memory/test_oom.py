"""Memory that runs out in the middle of a step: the weights come out as if nothing had happened."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastplug
from fastplug.memory import offload
from fastplug.memory.oom import Room, out_of_memory, requested, retried
from fastplug.memory.runtime import planners
from tests import models
from tests.memory.device import Device, MiB

pytest.importorskip("peft")

LAYERS, MICRO = 3, 4
MESSAGE = "CUDA out of memory. Tried to allocate 1.50 MiB. GPU 0 has a total capacity of 79.10 GiB"
sdpa = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 1)


class Failing:
    """Lets a call of something run out of memory: the ``call``-th of a micro-batch, counted from 1."""

    now = 0  # the micro-batch that runs

    def __init__(self, call: int = 0, micro: int | None = 1) -> None:
        self.call, self.micro, self.failed = call, micro, 0
        self.calls: dict[int, int] = {}

    def count(self) -> None:
        calls = self.calls[Failing.now] = self.calls.get(Failing.now, 0) + 1
        if calls == self.call and self.micro in (Failing.now, None):
            self.failed += 1
            raise torch.OutOfMemoryError(MESSAGE)

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count()
            return function(*args, **kwargs)

        return call


class Attention(torch.autograd.Function):
    """sdpa as a node whose backward can fail, as PyTorch's own may where no Python is around."""

    failing = Failing()

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rest: dict[str, Any]) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.rest = rest
        return sdpa(q, k, v, **rest)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        Attention.failing.count()
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            out = sdpa(*inputs, **ctx.rest)
        return (*torch.autograd.grad(out, inputs, g), None)


def train(memory: Any, model: Any = None) -> tuple[Any, dict[str, torch.Tensor]]:
    """Two optimizer steps of four micro-batches each; the model and its trained weights after them."""
    if model is None:
        model = models.lora(models.plain(num_hidden_layers=LAYERS), lora_dropout=0.1)
    fastplug.apply(model, **({} if memory is None else {"memory": memory}))
    for planner in planners(model):
        planner.meter = Device(model, 64 * MiB)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(11)
    for step in range(2):
        for micro in range(MICRO):
            Failing.now = step * MICRO + micro
            (model(**models.batch(2, 40, seed=Failing.now)).loss / MICRO).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, torch.Tensor]:
    return train(None)[1]


def agree(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("memory", ["keep", "2MiB", "1600KiB", "full"])
@pytest.mark.parametrize("where", ["forward", "backward", "attention's backward"])
def test_a_failure_in_the_second_micro_batch_of_four_changes_no_weight(
    memory: str, where: str, undisturbed: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    glu = importlib.import_module("fastplug.ops.glu.reference")
    failing = Failing(2)
    if where == "attention's backward":
        Attention.failing = failing
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **rest: Attention.apply(q, k, v, rest))
    else:
        monkeypatch.setattr(glu, where, failing.before(getattr(glu, where)))
    model, found = train(memory)
    assert failing.failed == 1
    agree(found, undisturbed)
    (planner,) = planners(model)
    assert any("a step ran out of memory" in note for note in fastplug.report(model).notes)
    assert failing.calls[1] > failing.calls[0]  # done again
    if memory == "keep":
        assert planner.room.dropped >= 1
        assert failing.calls[1] <= 2 * LAYERS + 1  # no layer more than once, and no step
        assert failing.calls[2] == failing.calls[0]


def with_plan(memory: str, total: int) -> tuple[Any, Any, Device, dict[str, torch.Tensor]]:
    """A model under a plan, its planner, the device of ``total`` bytes that it lies on, and a batch."""
    model = models.lora(models.plain(num_hidden_layers=LAYERS))
    fastplug.apply(model, memory=memory)
    (planner,) = planners(model)
    planner.meter = device = Device(model, total)
    return model, planner, device, models.batch(2, 120)


def test_the_plan_is_lowered_for_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    glu = importlib.import_module("fastplug.ops.glu.reference")
    model, planner, device, batch = with_plan("4MiB", 64 * MiB)
    model(**batch).loss.backward()
    first = planner.plan
    assert first is not None
    with monkeypatch.context() as patch:
        patch.setattr(glu, "forward", Failing(3, micro=None).before(glu.forward))
        model(**batch).loss.backward()
    released = device.released
    model(**batch).loss.backward()
    assert planner.plan is not None
    assert planner.plan.budget < first.budget
    assert planner.plan.total < first.total
    assert planner.room.dropped >= 1
    for _ in range(5):  # what others took may be free again: at the eighth forward, half of it is tried
        model(**batch).loss.backward()
    assert planner.plan.budget > first.budget - 1.5 * MiB
    assert device.released >= released


def test_another_process_takes_memory_and_the_next_plan_is_made_for_the_rest() -> None:
    model, planner, device, batch = with_plan("auto", 10 * MiB)
    model(**batch).loss.backward()
    assert planner.plan is not None
    before = planner.plan.budget
    device.others = 5 * MiB
    model(**batch).loss.backward()  # the second forward is one before which the numbers are taken anew
    assert planner.plan.budget == before - 5 * MiB
    assert planner.plan.total <= planner.plan.budget


def test_what_another_process_took_when_memory_ran_out_is_not_missing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    glu = importlib.import_module("fastplug.ops.glu.reference")
    model, planner, device, batch = with_plan("auto", 10 * MiB)
    for _ in range(2):
        model(**batch).loss.backward()
    assert planner.plan is not None
    before, planned = planner.plan.budget, planner.plan.total
    with monkeypatch.context() as patch:
        patch.setattr(glu, "forward", Failing(3, micro=None).before(glu.forward))
        device.others = taken = before - planned + 2 * MiB  # more than the 1.5 MiB that were asked for
        model(**batch).loss.backward()
    model(**batch).loss.backward()
    left = before - taken
    assert planner.room.dropped >= 1
    assert left - 0.5 * MiB <= planner.plan.budget < left


def test_head_and_loss_make_room(undisturbed: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    head = importlib.import_module("fastplug.patching.forwards.lm_head_loss")
    failing = Failing(1)
    monkeypatch.setattr(head, "linear_cross_entropy", failing.before(head.linear_cross_entropy))
    model, found = train("keep")
    assert failing.failed == 1
    agree(found, undisturbed)
    assert planners(model)[0].room.dropped >= 1


def test_where_dropping_makes_no_place_for_the_logits_fewer_are_made_at_a_time(
    undisturbed: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = importlib.import_module("fastplug.patching.forwards.lm_head_loss")
    loss, asked = head.linear_cross_entropy, []

    def scattered(*args: Any, chunk_size: int | None, **kwargs: Any) -> Any:
        asked.append(chunk_size)
        if chunk_size is None and Failing.now == 1:
            raise torch.OutOfMemoryError(MESSAGE)
        return loss(*args, chunk_size=chunk_size, **kwargs)

    monkeypatch.setattr(head, "linear_cross_entropy", scattered)
    model, found = train("keep")
    agree(found, undisturbed)
    assert asked.count(head.FEW) == 1
    assert planners(model)[0].room.dropped >= LAYERS


def test_where_nothing_is_left_to_drop_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    glu = importlib.import_module("fastplug.ops.glu.reference")

    def never(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr(glu, "forward", never)
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 1\.50 MiB.*fastplug has dropped all"):
        train("keep")


def test_without_a_plan_an_error_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    glu = importlib.import_module("fastplug.ops.glu.reference")
    monkeypatch.setattr(glu, "forward", Failing(3, micro=0).before(glu.forward))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(None)
    assert str(caught.value) == MESSAGE


def test_gradients_are_added_once_per_micro_batch() -> None:
    """Hooks on what autograd accumulates into see each gradient once, dropped or not: DDP counts on it."""
    model = models.lora(models.plain(num_hidden_layers=LAYERS))
    fastplug.apply(model, memory="keep")
    (planner,) = planners(model)
    planner.meter = Device(model, 64 * MiB)
    seen: dict[str, int] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: seen.get(name, 0) + 1}))
    loss = model(**models.batch()).loss
    assert [record.drop() for record in planner.room.records()] == [True] * LAYERS
    loss.backward()
    assert set(seen.values()) == {1}
    assert len(seen) == sum(p.requires_grad for p in model.parameters())


def test_a_parameter_with_a_hook_of_its_own_keeps_it() -> None:
    """A tensor's hook would be called for the layer's own graph too, so such a layer is not one node."""
    model = models.lora(models.plain(num_hidden_layers=2))
    fastplug.apply(model, memory="keep")
    calls: list[torch.Tensor] = []
    parameter: nn.Parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.register_hook(lambda g: calls.append(g))
    model(**models.batch()).loss.backward()
    assert len(calls) == 1


def test_messages_are_read() -> None:
    assert requested(MESSAGE) == 1.5 * MiB
    assert requested("Tried to allocate 2.00 GiB (GPU 0; ...") == 2 * 2**30
    assert requested("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)") == 0
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not out_of_memory(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        retried(Room(lambda: 0, lambda missing: None), lambda: _raise(RuntimeError("shape mismatch")))


def _raise(error: BaseException) -> None:
    raise error
