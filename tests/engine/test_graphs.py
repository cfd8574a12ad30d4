"""Replayed decoder layers against the same layers run eagerly.

On a GPU these are CUDA graphs. Elsewhere ops that are called again take their place, in memory that is used again as
that of a graph's pool is (``graphs_on_cpu.py``), so that everything but the capture itself is what runs on a GPU.
"""

from __future__ import annotations

import copy
import gc
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastplug
from fastplug.graphs import lengths as lengths_module
from fastplug.graphs import replay, state
from fastplug.graphs.layer_graph import Buffers, CheckpointedGraph, Exchange, KeptGraph
from fastplug.graphs.lengths import Lengths
from fastplug.graphs.recorder import CUDARecorder, Memory
from fastplug.ops.lora.adapted_unit import Unit
from fastplug.patching.sites import KEY
from tests import models
from tests.engine.graphs_on_cpu import CPURecorder
from tests.engine.step import relative
from tests.families import cases

pytest.importorskip("peft")

BOUND = 2e-5


@pytest.fixture(autouse=True)
def recorder(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(replay, "recorder_for", lambda device: CPURecorder())


def pair(device: torch.device, family: str = "llama", num_hidden_layers: int = 2, **lora: Any) -> tuple[Any, Any]:
    """The same LoRA model twice: run eagerly, and with layers that are replayed."""
    eager = models.lora(models.plain(family, num_hidden_layers=num_hidden_layers), **lora).to(device)
    replayed = copy.deepcopy(eager)
    fastplug.apply(eager, graphs="off")
    fastplug.apply(replayed, graphs="on")
    return eager, replayed


def batch(device: torch.device, length: int = 64, seed: int = 0, rows: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, models.VOCABULARY, (rows, length), generator=generator).to(device)
    return {"input_ids": tokens, "labels": tokens}


def hide(inputs: dict[str, torch.Tensor], mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The batch with a mask, and without labels where it is 0."""
    return {**inputs, "attention_mask": mask, "labels": inputs["labels"].masked_fill(mask == 0, -100)}


def padded(inputs: dict[str, torch.Tensor], positions: int) -> dict[str, torch.Tensor]:
    """The batch with so many positions of padding at the left of its second row."""
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :positions] = 0
    return hide(inputs, mask)


def train(model: Any, batches: list[dict[str, torch.Tensor]], **kwargs: Any) -> list[float]:
    """Losses of a step per batch."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for inputs in batches:
        loss = model(**inputs, **kwargs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
    return losses


def layers(model: Any) -> list[Any]:
    return list(model.get_base_model().model.layers)


def recorded(model: Any) -> list[int]:
    """Padded lengths that the first layer has recorded."""
    state = layers(model)[0].__dict__[KEY].graphs
    return sorted(graph.length for graphs in state.graphs.values() for graph in graphs) if state else []


def agree(eager: Any, replayed: Any) -> None:
    for (name, mine), theirs in zip(replayed.named_parameters(), eager.parameters()):
        assert relative(mine.detach(), theirs.detach()) <= BOUND, name


def agree_on_gradients(eager: Any, replayed: Any) -> None:
    for (name, mine), theirs in zip(replayed.named_parameters(), eager.parameters()):
        if theirs.grad is not None:
            assert relative(mine.grad, theirs.grad) <= BOUND, name


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_training_is_the_same(device: torch.device, family: str) -> None:
    eager, replayed = pair(device, family)
    batches = [batch(device, seed=i) for i in range(6)]
    truth, losses = train(eager, batches), train(replayed, batches)
    assert losses == pytest.approx(truth, rel=1e-5)
    assert len(set(losses)) == 6
    assert recorded(replayed) == [64]
    agree(eager, replayed)


@pytest.mark.parametrize("name", ["gemma 3", "phi 4 mini", "granite", "cohere 2", "smollm 3", "olmo 2"])
def test_layers_of_other_families(device: torch.device, name: str) -> None:
    if not cases.available(name):
        pytest.skip(f"this transformers version has no {name}")
    eager = cases.adapted(name).to(device)
    replayed = copy.deepcopy(eager)
    fastplug.apply(eager, graphs="off")
    fastplug.apply(replayed, graphs="on")
    batches = [batch(device, length, seed=i, rows=1) for i, length in enumerate([64, 64, 64, 50])]
    assert train(replayed, batches) == pytest.approx(train(eager, batches), rel=1e-5)
    states = [m.__dict__[KEY].graphs for m in replayed.modules() if KEY in m.__dict__]
    assert all(any(state.graphs.values()) for state in states if state)
    assert any(states)
    agree(eager, replayed)


def test_lengths_are_padded_to_few(device: torch.device) -> None:
    eager, replayed = pair(device)
    batches = [batch(device, length, seed=i) for i, length in enumerate([50, 40, 64, 33, 70, 128, 90, 40, 100, 64, 7])]
    assert train(replayed, batches) == pytest.approx(train(eager, batches), rel=1e-5)
    assert recorded(replayed) == [64, 128]
    agree(eager, replayed)


def lengths_of(model: Any) -> Lengths:
    (found,) = layers(model)[0].__dict__[KEY].runtime.graphs.lengths.values()
    return found  # type: ignore[no-any-return]


def graphs_of(layer: Any) -> list[Any]:
    return [graph for graphs in layer.__dict__[KEY].graphs.graphs.values() for graph in graphs]


def both_recorded(device: torch.device) -> tuple[Any, Any]:
    """A pair that has trained on 64 and 128 positions in turn."""
    eager, replayed = pair(device)
    for model in (eager, replayed):
        train(model, [batch(device, length) for length in [64, 128, 64, 128, 64, 128, 64]])
    assert recorded(replayed) == [64, 128]
    return eager, replayed


@pytest.fixture
def no_lending(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a memory plan: each length holds its activations, all in one pool."""
    find = state.Shared.lengths_of
    monkeypatch.setattr(state.Shared, "lengths_of", lambda self, layer, steady, lend: find(self, layer, steady, False))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("first", [256, 64])
def test_lengths_that_share_memory(first: int, masked: bool, device: torch.device) -> None:
    """Long ones before short ones, and the other way around; micro-batches of both in one step."""
    eager, replayed = pair(device)
    lengths = [first] * 3 + [128] * 3 + [64, 256] * 4 + [100, 128, 40, 250, 64, 120, 256, 33]
    batches = [batch(device, length, seed=i) for i, length in enumerate(lengths)]
    if masked:
        batches = [padded(inputs, inputs["input_ids"].shape[1] // 3) for inputs in batches]
    assert train(replayed, batches) == pytest.approx(train(eager, batches), rel=1e-5)
    assert recorded(replayed) == [64, 128, 256]
    agree(eager, replayed)
    for model in (eager, replayed):
        for inputs in batches[-6:]:
            model(**inputs).loss.backward()
    assert sorted(length.closed for length in lengths_of(replayed)._all) == [False, True, True]
    assert lengths_of(replayed).lend
    agree_on_gradients(eager, replayed)


def test_batches_with_and_without_padding(device: torch.device) -> None:
    """Masks come and go: what is recorded with one lends its memory to what is recorded without, and back."""
    eager, replayed = pair(device)
    batches = [batch(device, (128, 64)[i % 2], seed=i) for i in range(24)]
    batches = [padded(inputs, 9) if i % 4 > 1 else inputs for i, inputs in enumerate(batches)]
    assert train(replayed, batches) == pytest.approx(train(eager, batches), rel=1e-5)
    agree(eager, replayed)
    assert recorded(replayed) == [64, 64, 128, 128]
    assert lengths_of(replayed)._renewals == 0
    assert [length.closed for length in lengths_of(replayed)._all] == [True, True, True, False]


@pytest.mark.parametrize("lengths", [(64, 128, 64), (128, 64, 128)])
def test_forwards_of_two_lengths_before_a_backward(
    lengths: tuple[int, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one is not replayed; where that goes on, each length gets memory of its own, and both are."""
    monkeypatch.setattr(lengths_module, "CROSSINGS", 20)
    eager, replayed = both_recorded(device)
    for i in range(16):
        for model in (eager, replayed):
            model.zero_grad(set_to_none=True)
            losses = [model(**batch(device, length, seed=i)).loss for length in lengths]
            sum(losses[1:], losses[0]).backward()
        agree_on_gradients(eager, replayed)
        assert lengths_of(replayed).lend is (i < 10)
    assert recorded(replayed) == [64, 128]
    graphs = [graph for layer in layers(replayed) for graph in graphs_of(layer)]
    assert len({id(graph.among.pool) for graph in graphs}) == 2
    assert all(graph.run > 2 for graph in graphs)


@pytest.mark.usefixtures("no_lending")
@pytest.mark.parametrize("lengths", [(64, 128), (128, 64)])
@pytest.mark.parametrize("first", [0, 1])
def test_backwards_in_any_order_without_lending(first: int, lengths: tuple[int, int], device: torch.device) -> None:
    """A replay may write over what was recorded later: then the forward, or the backward, runs as usual."""
    eager, replayed = both_recorded(device)
    for i in range(3):
        for model in (eager, replayed):
            model.zero_grad(set_to_none=True)
            losses = [model(**batch(device, length, seed=i)).loss for length in lengths]
            losses[first].backward()
            losses[1 - first].backward()
        agree_on_gradients(eager, replayed)
    runs = [[graph.run for graph in graphs_of(layer)] for layer in layers(replayed)]
    replays = 2 if lengths == (64, 128) else 1  # in the other order the first one recorded is barred
    assert sum(run >= 2 * 4 for run in runs[0]) == replays


@pytest.mark.parametrize("lengths", [(64,), (128, 64)])
@pytest.mark.parametrize("lending", [True, False])
def test_a_layer_that_is_recorded_later_than_those_after_it(
    lending: bool, lengths: tuple[int, ...], device: torch.device, request: pytest.FixtureRequest
) -> None:
    """Those after it would write over its activations. So they run as usual, until all are recorded anew in order."""
    if not lending:
        request.getfixturevalue("no_lending")
    eager, replayed = pair(device, num_hidden_layers=4)
    for model in (eager, replayed):
        train(model, [batch(device, length) for length in lengths * 5])
        layers(model)[1].mlp.down_proj.scaling["default"] = 5.0
    batches = [batch(device, length, seed=i) for i in range(8) for length in lengths]
    assert train(replayed, batches) == pytest.approx(train(eager, batches), rel=1e-5)
    agree(eager, replayed)
    assert recorded(replayed) == sorted(lengths)
    for length in lengths:
        orders = [graph.order for layer in layers(replayed) for graph in graphs_of(layer) if graph.length == length]
        assert len(orders) == 4
        assert orders == sorted(orders)


@pytest.mark.parametrize("lending", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_steps_of_any_kind_in_any_order(
    seed: int, lending: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Lengths, masks, several forwards before their backwards, forwards without one, and layers that change."""
    if not lending:
        request.getfixturevalue("no_lending")
    monkeypatch.setattr(lengths_module, "CROSSINGS", 60)
    rng = random.Random(seed)
    eager, replayed = pair(device, num_hidden_layers=3)
    replays: list[int] = []
    forward = KeptGraph.forward
    monkeypatch.setattr(
        KeptGraph, "forward", lambda self, given, owner: replays.append(self.length) or forward(self, given, owner)
    )
    likely = [rng.choice([64, 128, 192]) for _ in range(2)]
    for _ in range(60):
        if rng.random() < 0.08:
            index, scaling = rng.randrange(3), rng.random()
            for model in (eager, replayed):
                layers(model)[index].mlp.down_proj.scaling["default"] = scaling
        calls = []
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            inputs = batch(device, rng.choice([*likely * 3, 40, 64, 100, 128, 192]), seed=rng.randrange(1000))
            calls.append((padded(inputs, 9) if rng.random() < 0.2 else inputs, rng.random()))
        together = rng.random() < 0.5
        for model in (eager, replayed):
            model.zero_grad(set_to_none=True)
            losses = [(model(**inputs).loss, order) for inputs, order in calls]
            losses = [loss for loss, order in sorted(losses, key=lambda pair: pair[1]) if order < 0.9]
            for loss in [sum(losses[1:], losses[0])] if together and losses else losses:
                loss.backward()
        agree_on_gradients(eager, replayed)
    assert len(replays) > 30


def test_a_second_backward_is_an_error_at_once(device: torch.device) -> None:
    """The backward of the layer before has written over what this one would need again."""
    _, replayed = pair(device)
    train(replayed, [batch(device)] * 4)
    loss = replayed(**batch(device)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="graphs='off'"):
        loss.backward()


@pytest.mark.parametrize("before_it", [(), (256,) * 4])
def test_short_lengths_take_no_memory_beside_a_long_one(before_it: tuple[int, ...], device: torch.device) -> None:
    config = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "max_position_embeddings": 512}

    def lora() -> Any:
        model = models.lora(models.plain(**config)).to(device)
        fastplug.apply(model, graphs="on")
        return model

    replayed = lora()

    def taken(*lengths: int) -> int:
        train(replayed, [batch(device, length) for length in lengths])
        if device.type == "cpu":
            return lengths_of(replayed)._pool.recorder.arena.most  # type: ignore[attr-defined, no-any-return]
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    before = taken(512)
    one = taken(*[512] * 4) - before
    assert one > 0
    replayed = lora()
    assert taken(*before_it, *[512] * 4, *[256, 384, 448] * 4) - before <= 1.25 * one
    assert recorded(replayed) == [256, 384, 448, 512]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_masks(device: torch.device, side: str) -> None:
    eager, replayed = pair(device)
    batches = []
    for i, length in enumerate([64, 64, 64, 50, 64, 60]):
        inputs = batch(device, length, seed=i)
        mask = torch.ones_like(inputs["input_ids"])
        mask[1, : 5 + i] = 0
        batches.append(hide(inputs, mask if side == "left" else mask.flip(1)))
    assert train(replayed, batches) == pytest.approx(train(eager, batches), rel=1e-5)
    assert recorded(replayed) == [64]
    agree(eager, replayed)


def test_accumulated_gradients_are_not_the_ones_that_the_next_replay_writes(device: torch.device) -> None:
    eager, replayed = pair(device)
    for model in (eager, replayed):
        for i in range(6):
            model(**batch(device, seed=i)).loss.backward()
    assert recorded(replayed) == [64]
    agree_on_gradients(eager, replayed)


def test_a_second_forward_before_the_backward_keeps_the_first_ones_activations(device: torch.device) -> None:
    eager, replayed = pair(device)
    for model in (eager, replayed):
        train(model, [batch(device)] * 4)
        losses = [model(**batch(device, seed=i)).loss for i in range(3)]
        sum(losses[1:], losses[0]).backward()
    assert recorded(replayed) == [64]
    agree_on_gradients(eager, replayed)


def test_a_forward_without_a_backward_does_not_block(device: torch.device) -> None:
    _, replayed = pair(device)
    train(replayed, [batch(device)] * 4)
    replayed(**batch(device))
    (graphs,) = layers(replayed)[0].__dict__[KEY].graphs.graphs.values()
    assert not graphs[0].busy


def changes() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    def scale(model: Any) -> None:
        for layer in layers(model):
            layer.mlp.down_proj.scaling["default"] = 5.0

    def assign(model: Any) -> None:
        state = {name: tensor.detach().clone() * 1.5 for name, tensor in model.state_dict().items()}
        model.load_state_dict(state, assign=True)

    def move(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = parameter.data * 2

    def hook(model: Any) -> None:
        for layer in layers(model):
            layer.mlp.up_proj.register_forward_hook(lambda module, args, out: out * 1.1)

    def freeze(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "q_proj.lora_A" in name:
                parameter.requires_grad_(False)

    yield "another scaling", scale
    yield "load_state_dict(assign=True)", assign
    yield "parameter.data", move
    yield "a forward hook", hook
    yield "a frozen matrix", freeze
    yield "merged", lambda model: model.merge_adapter()
    yield "another adapter", lambda model: (models.add(model), model.set_adapter("other"))


@pytest.mark.parametrize(("name", "change"), list(changes()), ids=lambda value: value if isinstance(value, str) else "")
def test_what_changes_is_not_replayed(device: torch.device, name: str, change: Callable[[Any], Any]) -> None:
    eager, replayed = pair(device)
    batches = [batch(device, seed=i) for i in range(5)]
    for model in (eager, replayed):
        train(model, batches)
        change(model)
    assert recorded(replayed) == [64]
    inputs = batch(device, seed=9)
    for _ in range(4):  # and recorded again
        truth, mine = eager(**inputs).loss, replayed(**inputs).loss
        assert relative(mine.detach(), truth.detach()) <= BOUND
        for loss, model in ((truth, eager), (mine, replayed)):
            model.zero_grad(set_to_none=True)
            if loss.requires_grad:
                loss.backward()
        for (where, ours), theirs in zip(replayed.named_parameters(), eager.parameters()):
            assert (ours.grad is None) == (theirs.grad is None), where
            if theirs.grad is not None:
                assert relative(ours.grad, theirs.grad) <= BOUND, where


def test_a_layer_whose_frozen_weight_was_written_to_is_another(device: torch.device) -> None:
    _, replayed = pair(device)
    train(replayed, [batch(device)] * 4)
    layer, other = layers(replayed)
    prints = [part.__dict__[KEY].graphs.fingerprint for part in (layer, other)]
    with torch.no_grad():
        for p in layer.parameters():
            if p.requires_grad:
                p.mul_(2)  # as an optimizer's step does
    assert prints[0].holds(layer)
    layer.mlp.up_proj.base_layer.weight.data.mul_(2)
    layer.mlp.up_proj.base_layer.weight.detach().mul_(1)
    assert not prints[0].holds(layer)
    assert prints[1].holds(other)


def test_a_disabled_adapter_is_not_replayed(device: torch.device) -> None:
    eager, replayed = pair(device)
    for model in (eager, replayed):
        train(model, [batch(device, seed=i) for i in range(4)])
    inputs = batch(device, seed=7)
    with eager.disable_adapter(), replayed.disable_adapter():
        assert relative(replayed(**inputs).loss, eager(**inputs).loss) <= BOUND
    assert relative(replayed(**inputs).loss.detach(), eager(**inputs).loss.detach()) <= BOUND


def test_a_shallow_copy_is_not_taken_for_the_layer(device: torch.device) -> None:
    """As a replica of ``nn.DataParallel``, it carries the binding of the original and weights of its own."""
    eager, replayed = pair(device)
    for model in (eager, replayed):
        train(model, [batch(device)] * 4)
        replica = copy.copy(layers(model)[0])
        replica._modules = {**replica._modules, "mlp": copy.deepcopy(replica.mlp)}
        for parameter in replica.mlp.parameters():
            parameter.data.mul_(1.5)
        model.get_base_model().model.layers[0] = replica
    truth, mine = eager(**batch(device, seed=5)).loss, replayed(**batch(device, seed=5)).loss
    assert relative(mine.detach(), truth.detach()) <= BOUND


def test_weights_that_move_between_forward_and_backward(device: torch.device) -> None:
    eager, replayed = pair(device)
    for model in (eager, replayed):
        train(model, [batch(device)] * 4)
        loss = model(**batch(device, seed=5)).loss
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # as FSDP2 does: the same values at another address
        loss.backward()
    agree_on_gradients(eager, replayed)


def test_hidden_states_that_somebody_keeps_stay_as_they_were(device: torch.device) -> None:
    _, replayed = pair(device)
    train(replayed, [batch(device)] * 4)
    kept = replayed(**batch(device, seed=1), output_hidden_states=True).hidden_states
    before = [state.detach().clone() for state in kept]
    replayed.zero_grad(set_to_none=True)
    train(replayed, [batch(device, seed=2)])
    assert all(torch.equal(state, copied) for state, copied in zip(kept, before))


def test_a_second_backward_after_another_forward_is_an_error(device: torch.device) -> None:
    _, replayed = pair(device)
    train(replayed, [batch(device)] * 4)
    loss = replayed(**batch(device)).loss
    loss.backward(retain_graph=True)
    replayed(**batch(device))
    with pytest.raises(RuntimeError, match="graphs='off'"):
        loss.backward()


def test_lora_dropout_is_drawn_anew_and_depends_on_the_seed_alone(device: torch.device) -> None:
    _, replayed = pair(device, lora_dropout=0.3)
    train(replayed, [batch(device)] * 4)
    assert recorded(replayed) == [64]

    def losses() -> list[float]:
        torch.manual_seed(3)
        return [float(replayed(**batch(device)).loss) for _ in range(3)]

    first = losses()
    assert len(set(first)) == 3
    assert losses() == first


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(device: torch.device, reentrant: bool) -> None:
    eager, replayed = pair(device)
    for model in (eager, replayed):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    batches = [batch(device, length, seed=i) for i, length in enumerate([64, 60, 64, 64, 50, 64])]
    assert train(replayed, batches) == pytest.approx(train(eager, batches), rel=1e-5)
    assert recorded(replayed) == [64]
    agree(eager, replayed)
    for model in (eager, replayed):  # nothing of a layer stays, so forwards need not wait for backwards
        losses = [model(**batch(device, seed=i)).loss for i in range(3)]
        sum(losses[1:], losses[0]).backward()
    agree_on_gradients(eager, replayed)


def test_what_a_first_pass_hands_over_is_not_made_again(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    _, replayed = pair(device)
    replayed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    replayed.enable_input_require_grads()
    passes: list[str] = []
    result, record = Unit.result, CheckpointedGraph.record

    def counted(self: CheckpointedGraph, recorder: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Unit, "result", lambda self: passes.append("") or result(self))
            record(self, recorder)

    monkeypatch.setattr(CheckpointedGraph, "record", counted)
    train(replayed, [batch(device)] * 4)
    # To count what is saved, and in the first pass; none for the second.
    assert len(passes) == 2 * len(layers(replayed))
    for layer in layers(replayed):
        (graph,) = next(iter(layer.__dict__[KEY].graphs.graphs.values()))
        assert [tensor.shape for tensor in graph._handed] == [(2 * 64, 4)]


def test_long_steps_are_recorded_without_padding(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """From so many tokens on padding takes longer than a replay spares."""
    monkeypatch.setattr(replay, "FLOPS", -1.0)  # what matrices as small as these count for is 0
    eager, replayed = pair(device)
    for model in (eager, replayed):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    lengths = [1100, 1100, 1090, 1152, 1150, 1200, 1060]
    batches = [batch(device, length, seed=i, rows=1) for i, length in enumerate(lengths)]
    assert train(replayed, batches) == pytest.approx(train(eager, batches), rel=1e-5)
    assert recorded(replayed) == [1152]  # on the coarse grid of short steps it would be 1280


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of any length are long ones, which FP8 is to record: matrices as small as these count for 0."""
    monkeypatch.setattr(replay, "FLOPS", -1.0)
    monkeypatch.setattr(replay, "FP8", 0.0)


def fp8_pair(device: torch.device) -> tuple[Any, Any]:
    eager = models.lora(models.plain("llama")).to(device, torch.bfloat16)
    replayed = copy.deepcopy(eager)
    fastplug.apply(eager, graphs="off", compute="fp8")
    fastplug.apply(replayed, compute="fp8")
    return eager, replayed


def held(model: Any) -> list[int]:
    return [sum(map(len, layer.__dict__[KEY].graphs.graphs.values())) for layer in layers(model)]


@pytest.mark.usefixtures("long")
def test_long_fp8_steps_of_one_size_are_recorded(device: torch.device) -> None:
    eager, replayed = fp8_pair(device)
    batches = [batch(device, 128, seed=i) for i in range(5)]
    assert train(replayed, batches) == pytest.approx(train(eager, batches), rel=1e-5)
    assert recorded(replayed) == [128]
    agree(eager, replayed)


@pytest.mark.usefixtures("long")
def test_long_steps_whose_forward_is_exact_are_left_alone(device: torch.device) -> None:
    model = models.lora(models.plain("llama")).to(device, torch.bfloat16)
    fastplug.apply(model, compute="fp8_backward")
    train(model, [batch(device, 128)] * 4)
    assert held(model) == [0] * len(layers(model))


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("call", ["evaluation", "generation"])
def test_recordings_of_long_steps_are_let_go_where_another_call_comes(device: torch.device, call: str) -> None:
    """The memory that they hold for good may be what it needs."""
    eager, replayed = fp8_pair(device)
    a, b = batch(device, 128), batch(device, 64)
    for model in (eager, replayed):
        train(model, [a] * 4)
    assert held(replayed) == [1] * len(layers(replayed))
    losses = [train(model, [b, a, a]) for model in (replayed, eager)]
    assert held(replayed) == [0] * len(layers(replayed))  # it takes three calls in a row
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert train(replayed, [a]) == pytest.approx(train(eager, [a]), rel=1e-5)
    assert held(replayed) == [1] * len(layers(replayed))
    replayed.eval()
    with torch.no_grad():
        if call == "evaluation":
            replayed(**a)
        else:  # of a prompt so short that patched modules leave it to the original ones
            replayed.generate(input_ids=a["input_ids"][:, :8], max_new_tokens=2)
    assert held(replayed) == [0] * len(layers(replayed))
    replayed.train()
    agree(eager, replayed)


@pytest.mark.usefixtures("long")
def test_recordings_of_long_steps_that_wait_for_a_backward_outlast_another_call(device: torch.device) -> None:
    eager, replayed = fp8_pair(device)
    for model in (eager, replayed):
        train(model, [batch(device)] * 4)
        loss = model(**batch(device)).loss
        model(**batch(device, 90)).loss.backward()
        loss.backward()
    agree_on_gradients(eager, replayed)


@pytest.mark.usefixtures("long")
def test_long_steps_that_alternate_are_soon_left_alone(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, replayed = fp8_pair(device)
    batches = [batch(device, 128)] * 3 + [batch(device, 64)] * 3
    monkeypatch.setattr(state, "CHANGES", 2)
    for model in (eager, replayed):
        train(model, batches * 3)
    steady = layers(replayed)[0].__dict__[KEY].runtime.graphs.steady
    assert (steady.changes, steady.off) == (3, True)
    assert held(replayed) == [0] * len(layers(replayed))
    agree(eager, replayed)


@pytest.mark.usefixtures("long")
def test_evaluations_now_and_then_leave_long_steps_recorded(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, replayed = fp8_pair(device)
    a = batch(device, 128)
    monkeypatch.setattr(state, "CHANGES", 1)
    monkeypatch.setattr(state, "WORTH", 4)
    for _ in range(3):
        train(replayed, [a] * 4)
        assert held(replayed) == [1] * len(layers(replayed))
        with torch.no_grad():
            replayed(**a)
    steady = layers(replayed)[0].__dict__[KEY].runtime.graphs.steady
    assert (steady.changes, steady.off) == (0, False)


@pytest.mark.usefixtures("long")
def test_too_little_memory_for_long_steps_leaves_short_ones_recorded(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, replayed = fp8_pair(device)
    kind = type(replay.recorder_for(device))
    sizes = iter([Memory(0, 0, 1000 << 20), Memory(300 << 20, 300 << 20, 0)])
    monkeypatch.setattr(kind, "memory", lambda self: next(sizes))
    batches = [batch(device, seed=i) for i in range(5)]
    assert train(replayed, batches) == pytest.approx(train(eager, batches), rel=1e-5)
    assert held(replayed) == [0] * len(layers(replayed))
    assert any("launched layer by layer" in note for note in fastplug.report(replayed).notes)
    assert layers(replayed)[0].__dict__[KEY].runtime.graphs.off is None


def test_a_pool_that_no_graph_is_left_of_is_not_recorded_in_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch frees it, and refuses."""
    pools: list[int] = []

    class Graph:
        def capture_begin(self, pool: int, capture_error_mode: str) -> None:
            pools.append(pool)

        def capture_end(self) -> None: ...
        def replay(self) -> None: ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", itertools.count().__next__)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    recorder = CUDARecorder(torch.device("cuda", 0))
    kept = [recorder.record(list)[1] for _ in range(2)]
    kept.pop(0)
    kept.append(recorder.record(list)[1])
    kept.clear()
    gc.collect()
    kept = [recorder.record(list)[1] for _ in range(2)]
    assert pools == [0, 0, 0, 1, 1]


def test_padding_of_an_input_that_others_write_over_is_zero() -> None:
    x, cos = torch.ones(2, 40, 4), torch.ones(1, 40, 2)
    buffers = Buffers((x, cos, cos, None), 64)
    buffers.move()
    for _ in range(2):
        buffers.x.fill_(float("nan"))
        buffers.set((x, cos, cos, None))
        assert buffers.x[:, :40].eq(1).all()
        assert buffers.x[:, 40:].eq(0).all()


def test_padding_of_a_shared_gradient_is_zero() -> None:
    exchange = Exchange()
    exchange.fit(torch.empty(1, 8, 2), torch.empty(1, 8, 2), keeps=True)
    exchange.set_gradient(torch.ones(1, 6, 2))
    exchange.set_gradient(torch.ones(1, 3, 2))
    assert exchange.g[0, :, 0].tolist() == [1.0] * 3 + [0.0] * 5


def test_checkpointed_layers_with_dropout_are_left_alone(device: torch.device) -> None:
    """Two replays of a forward would draw two masks."""
    _, replayed = pair(device, lora_dropout=0.3)
    replayed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    replayed.enable_input_require_grads()
    train(replayed, [batch(device)] * 4)
    assert recorded(replayed) == []


def test_evaluation_is_left_alone(device: torch.device) -> None:
    _, replayed = pair(device)
    with torch.no_grad():
        for _ in range(4):
            training = replayed(**batch(device)).loss
        assert recorded(replayed) == []
        assert relative(replayed.eval()(**batch(device)).loss, training) <= BOUND


def test_a_failing_recording_turns_graphs_off(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, replayed = pair(device)

    def fail(self: Any, recorder: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay.KeptGraph, "record", fail)
    batches = [batch(device, seed=i) for i in range(5)]
    assert train(replayed, batches) == pytest.approx(train(eager, batches), rel=1e-5)
    (note,) = fastplug.report(replayed).notes
    assert "not permitted" in note


@pytest.mark.parametrize("after", [Memory(200 << 20, 200 << 20, 0), Memory(10 << 20, 400 << 20, 0)])  # own, and shared
def test_too_little_memory_turns_graphs_off(
    after: Memory, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, replayed = pair(device)
    kind = type(replay.recorder_for(device))
    sizes = iter([Memory(0, 0, 1000 << 20), after])
    monkeypatch.setattr(kind, "memory", lambda self: next(sizes))
    batches = [batch(device, seed=i) for i in range(5)]
    assert train(replayed, batches) == pytest.approx(train(eager, batches), rel=1e-5)
    assert "GiB that are free" in fastplug.report(replayed).notes[0]


def test_a_copy_and_an_undo_take_nothing_along(device: torch.device) -> None:
    _, replayed = pair(device)
    train(replayed, [batch(device)] * 4)
    twin = copy.deepcopy(replayed)
    assert recorded(twin) == []
    train(twin, [batch(device)] * 4)
    fastplug.undo(replayed)
    assert KEY not in layers(replayed)[0].__dict__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.gpu
def test_autocast(dtype: torch.dtype, device: torch.device) -> None:
    eager, replayed = pair(device)
    batches = [batch(device, seed=i) for i in range(5)]
    with torch.autocast("cuda", dtype):
        truth, losses = train(eager, batches), train(replayed, batches)
    assert losses == pytest.approx(truth, rel=1e-5)
    assert recorded(replayed) == [64]
