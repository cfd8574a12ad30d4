"""Decoded weights that are kept: the same bits as decoding them each time, until the stored ones change."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastplug
from fastplug.errors import OptionError
from fastplug.memory.reading import Reading
from fastplug.ops.lora.group import Group
from fastplug.ops.lora.kept_weights import RENEWALS, KeptWeights
from tests import models
from tests.engine.step import patched, step


@pytest.fixture
def batch(device):
    return {name: value.to(device) for name, value in models.batch(2, 16).items()}


def same(ours, theirs) -> None:
    assert torch.equal(ours.loss, theirs.loss)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in ours.gradients.items():
        assert torch.equal(gradient, theirs.gradients[name]), name


@pytest.mark.parametrize("dora", [False, True])
def test_the_same_bits_and_no_decoding_after_the_first_step(device, batch, decoded, dora):
    model = (models.lora(models.quantized(models.plain()), use_dora=True) if dora else models.qlora()).to(device)
    expected = step(patched(model), batch)
    twin = patched(model, base_weights="kept")
    decoded.clear()
    same(step(twin, batch), expected)
    first = decoded["decoded"]
    decoded.clear()
    same(step(twin, batch), expected)
    assert first > 0
    assert decoded["decoded"] == 0
    assert "decoded once and kept in 16 bits" in str(fastplug.report(twin))


def test_a_weight_that_is_written_to_is_decoded_again(device, batch):
    model = models.qlora().to(device)
    twin = patched(model, base_weights="kept")
    step(twin, batch)
    twin.merge_adapter()
    twin.unmerge_adapter()
    other = models.qlora(seed=7).to(device)
    for (name, mine), (_, theirs) in zip(twin.named_parameters(), other.named_parameters()):
        if mine.dtype == torch.uint8:
            assert "weight" in name
            with torch.no_grad():
                mine.copy_(theirs)
            mine.quant_state = theirs.quant_state
        else:
            mine.data.copy_(theirs.data)
    same(step(twin, batch), step(patched(other), batch))


def test_what_was_kept_goes_with_the_patch(device, batch):
    """At once, not with the next collection, and a copy keeps its own."""
    model = models.qlora().to(device)
    applied = fastplug.apply(model, base_weights="kept")
    twin = copy.deepcopy(model)
    step(model, batch)
    step(twin, batch)
    patched_one = next(module for module in model.modules() if "_fastplug" in module.__dict__)
    weights = patched_one._fastplug.runtime.weights
    owners = {module: model for model in (model, twin) for module in model.modules()}
    kept = [(weakref.ref(entry.form), owners[entry.owners[0]()]) for entry in weights._entries.values()]
    assert {owner for _, owner in kept} == {model, twin}
    held = weights.held
    gc.collect()
    gc.disable()
    try:
        applied.undo()
        assert all((ref() is None) == (owner is model) for ref, owner in kept)
    finally:
        gc.enable()
    assert weights.held == held // 2


@pytest.mark.parametrize(("choice", "options"), [("decoded", {}), ("auto", {"memory": "keep"})])
def test_nothing_is_kept_unless_it_is_asked_for(device, batch, decoded, choice, options):
    twin = patched(models.qlora().to(device), base_weights=choice, **options)
    step(twin, batch)
    decoded.clear()
    step(twin, batch)
    assert decoded["decoded"] > 0
    assert "kept in 16 bits" not in str(fastplug.report(twin))


@pytest.mark.parametrize(("options", "less"), [({}, 2), ({"memory": "full"}, 0)])
def test_a_layer_that_is_computed_again_decodes_gate_and_up_once_for_it_and_its_backward(
    device, batch, decoded, monkeypatch, options, less
):
    """Not under a plan, which counts on the memory."""
    model = models.qlora().to(device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    twin = patched(model, graphs="off", **options)
    decoded.clear()
    ours = step(twin, batch)
    shared = decoded["decoded"]
    with monkeypatch.context() as m:
        m.setattr(Group, "decoded_weights", lambda self: ())
        decoded.clear()
        same(ours, step(twin, batch))
        assert decoded["decoded"] == shared + less * model.config.num_hidden_layers
    assert shared % model.config.num_hidden_layers == 0


def test_of_layers_that_are_computed_again_together_one_keeps_decoded_weights(device, decoded, monkeypatch):
    """They would all be there at once."""
    model = patched(models.qlora(num_hidden_layers=3).to(device), graphs="off").train()
    inner = model.get_base_model().model
    tokens = models.batch(1, 16)["input_ids"].to(device)

    def run(x):
        positions = inner.rotary_emb(x, torch.arange(16, device=device)[None])
        for layer in inner.layers:
            x = layer(x, position_embeddings=positions, attention_mask=None)
        return x

    def gradients():
        decoded.clear()
        model.zero_grad()
        x = inner.embed_tokens(tokens).detach().requires_grad_()
        checkpoint(run, x, use_reentrant=False).float().square().mean().backward()
        return decoded["decoded"], [p.grad for p in model.parameters() if p.grad is not None]

    (first, mine), (second, again) = gradients(), gradients()
    with monkeypatch.context() as m:
        m.setattr(Group, "decoded_weights", lambda self: ())
        alone, expected = gradients()
    assert first == second == alone - 2
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(mine, again, expected, strict=True))


@pytest.fixture
def long_batch(device):
    """Whose activations are larger than a layer's weights."""
    return {name: value.to(device) for name, value in models.batch(8, 64).items()}


@pytest.mark.parametrize("dora", [False, True])
def test_decoded_once_a_step(device, long_batch, decoded, dora):
    """Each forward finds what the backward before has decoded; DoRA scales its weights where they lie."""
    model = (models.lora(models.quantized(models.plain()), use_dora=True) if dora else models.qlora()).to(device)
    expected = step(patched(model), long_batch)
    twin = patched(model, base_weights="once", graphs="off")
    assert "kept for the next forward" in str(fastplug.report(twin))
    decoded.clear()
    same(step(twin, long_batch), expected)
    first = decoded["decoded"]
    for _ in range(2):
        decoded.clear()
        same(step(twin, long_batch), expected)
        assert decoded["decoded"] == (first if dora else 7 * model.config.num_hidden_layers)
    assert first > 7 * model.config.num_hidden_layers
    assert (models.kept_weights(twin).handed > 0) != dora
    with torch.no_grad():
        twin(**long_batch)
    assert models.kept_weights(twin).handed == 0  # an evaluation takes it, too


def test_nothing_stays_for_the_next_forward_where_it_would_be_the_peak(device, batch, long_batch):
    model = models.qlora().to(device)
    twin = patched(model, base_weights="once", graphs="off").train()
    step(twin, batch)  # activations are smaller than weights
    assert models.kept_weights(twin).handed == 0
    loss = twin(**long_batch).loss
    loss.backward(retain_graph=True)  # they stay
    assert models.kept_weights(twin).handed == 0
    loss.backward()
    assert models.kept_weights(twin).handed > 0
    before = models.kept_weights(twin).handed
    assert models.kept_weights(twin).let_go() == before
    assert models.kept_weights(twin).handed == 0
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        checkpointed = patched(model, base_weights="once", graphs="off")
        step(checkpointed, long_batch)
        assert models.kept_weights(checkpointed).handed == 0


def test_two_forwards_before_their_backwards(device, long_batch, decoded):
    """What the first backward leaves serves the second one, and the forward after it."""
    model = models.qlora().to(device)
    expected = step(patched(model), long_batch)
    twin = patched(model, base_weights="once", graphs="off").train()
    for _ in range(2):
        losses = [twin(**long_batch).loss for _ in range(2)]
        decoded.clear()
        losses[1].backward()
        first = decoded["decoded"]  # not q, k and v of the first layer, whose input has no gradient
        assert first == 7 * model.config.num_hidden_layers - 3
        twin.zero_grad(set_to_none=True)
        losses[0].backward()
        assert decoded["decoded"] == first
        for name, parameter in twin.named_parameters():
            if parameter.grad is not None:
                assert torch.equal(parameter.grad, expected.gradients[name]), name
        twin.zero_grad(set_to_none=True)


def test_once_with_layers_that_are_recorded_is_reported(device):
    twin = patched(models.qlora().to(device), base_weights="once", graphs="on")
    assert "base_weights='once' does nothing with graphs='on'" in str(fastplug.report(twin))


@pytest.mark.gpu
def test_what_stays_for_the_next_forward_is_hardly_in_the_peak(device):
    """The weights of one layer at most, beside what is there anyway."""
    model = models.qlora(hidden_size=512, intermediate_size=1536, num_hidden_layers=8).to(device)
    batch = {name: value.to(device) for name, value in models.batch(8, 512).items()}
    peaks = []
    for choice in ("decoded", "once"):
        applied = fastplug.apply(model, base_weights=choice, graphs="off")
        for i in range(3):
            if i == 2:
                torch.cuda.reset_peak_memory_stats()
            model(**batch).loss.backward()
            model.zero_grad(set_to_none=True)
        peaks.append(torch.cuda.max_memory_allocated())
        applied.undo()
    layer = model.get_base_model().model.layers[0]
    weights = sum(m.in_features * m.out_features for m in layer.modules() if type(m).__name__ == "Linear4bit")
    assert peaks[1] - peaks[0] <= 2 * weights + 2**20


@pytest.mark.parametrize("memory", ["keep", "a budget"])
def test_decoded_once_a_step_under_a_plan(device, long_batch, decoded, memory):
    model = models.qlora().to(device)
    expected = step(patched(model), long_batch)
    if memory == "a budget":
        memory = "64MiB" if device.type == "cpu" else "2GiB"  # a CUDA context takes half a GiB
    twin = patched(model, base_weights="once", memory=memory, graphs="off")
    for _ in range(3):
        decoded.clear()
        same(step(twin, long_batch), expected)
    assert memory != "keep" or models.kept_weights(twin).handed > 0
    assert models.kept_weights(twin).once


@pytest.mark.parametrize(("length", "leaves"), [(64, True), (65, False)])
def test_under_a_plan_nothing_is_left_in_the_place_of_much_larger_activations(device, monkeypatch, length, leaves):
    """It would cut up memory that they need next: more tokens than two times the width."""
    monkeypatch.setattr(Reading, "decoded", lambda *_: (0, 0.0))  # no room for weights that stay
    twin = patched(models.qlora().to(device), base_weights="once", memory="2GiB", graphs="off")
    step(twin, {name: value.to(device) for name, value in models.batch(2, length).items()})
    assert twin.config.hidden_size == 64
    assert (models.kept_weights(twin).handed > 0) == leaves


def test_what_was_handed_on_is_of_the_weights_as_they_are():
    kept, owner, device = KeptWeights(False, once=True), Owner(), torch.device("cpu")

    def get(address: int, hands_on: bool) -> tuple[object, bool]:
        return kept.get([owner], "form", lambda: [(address, 0)], anything, device, hands_on)

    first, stays = get(0, hands_on=True)
    assert stays
    found, stays = get(0, hands_on=False)
    assert found is first
    assert not stays
    assert get(0, hands_on=False)[0] is not first
    get(0, hands_on=True)
    for address in range(1, RENEWALS + 2):  # weights that move all the time
        found, stays = get(address, hands_on=True)
        assert stays == (address < RENEWALS)
    assert not kept._handed
    other = Owner()
    kept.get([other], "form", list, anything, device, hands_on=True)
    assert len(kept._handed) == 1
    kept.forget([other])
    assert not kept._handed


def test_a_backward_leaves_something_of_its_own_accord_where_half_of_the_memory_is_free(monkeypatch):
    free, asked, task = {"bytes": 60}, [], {"id": 7}

    def memory(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return free["bytes"], 100

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: task["id"])
    kept, gpu, owners = KeptWeights(False, once=None), torch.device("cuda"), [Owner(), Owner(), Owner()]

    def stays(owner: Owner, hands_on: bool = True) -> bool:
        return kept.get([owner], "form", list, anything, gpu, hands_on)[1]

    assert [stays(owner) for owner in owners[:2]] == [True, True]
    assert len(asked) == 1  # once for all of a backward
    free["bytes"] = 40
    assert stays(owners[2])
    assert not stays(owners[0], hands_on=False)
    task["id"] = 8
    assert not stays(owners[0])
    assert len(asked) == 2
    assert not KeptWeights(False, once=None).get(owners[:1], "form", list, anything, torch.device("cpu"), True)[1]


def test_what_is_handed_on_lies_in_blocks_of_the_largest_activation():
    """One that the backward frees, so that the forward's next activation of that size finds it."""
    kept, owners, cpu = KeptWeights(False, once=True), [Owner() for _ in range(4)], torch.device("cpu")

    def get(owner: Owner, numbers: int, hands_on: bool = True) -> torch.Tensor:
        def make(empty) -> torch.Tensor:
            return empty((numbers,), dtype=torch.float32, device=cpu).fill_(numbers)

        return kept.get([owner], "form", list, make, cpu, hands_on)[0]

    kept.frees(1024 + 512)
    forms = [get(owner, numbers) for owner, numbers in zip(owners, (200, 100, 100, 70))]  # bytes: 800, 400, 400, 280
    storages = [form.untyped_storage().data_ptr() for form in forms]
    assert storages[0] == storages[1]  # at 0 and 1024
    assert len(set(storages)) == 3  # the others would not fit
    assert [float(form.max()) for form in forms] == [200, 100, 100, 70]
    assert kept.handed == 1536 + 400 + 280
    assert get(owners[0], 200, hands_on=False) is forms[0]
    assert kept.handed == 1536 + 400 + 280  # the block is still there
    get(owners[1], 100, hands_on=False)
    assert kept.handed == 400 + 280
    assert kept._block is None
    assert get(owners[0], 200).untyped_storage().nbytes() == 800  # a backward that frees no such activation


@pytest.mark.parametrize("length", [40, 80, 200])
def test_a_layer_leaves_its_weights_in_one_block(device, length):
    model = models.qlora().to(device)
    twin = patched(model, base_weights="once", graphs="off")
    step(twin, {name: value.to(device) for name, value in models.batch(2, length).items()})
    config, forms = model.config, [entry.form for entry in models.kept_weights(twin)._handed.values()]
    storages = {form.untyped_storage().data_ptr(): form.untyped_storage().nbytes() for form in forms}
    itemsize, layers = forms[0].element_size(), config.num_hidden_layers
    mlp = 3 * config.hidden_size * config.intermediate_size * itemsize
    activation = 2 * config.intermediate_size * 2 * length * itemsize
    all_weights = sum(form.numel() for form in forms) * itemsize
    if length == 80:
        assert mlp < all_weights // layers <= activation <= 2 * mlp
        assert list(storages.values()) == [activation] * layers
        assert models.kept_weights(twin).handed == layers * activation
    else:  # the activation is smaller than the weights, or so large that a block of its size would mostly be empty
        assert activation < mlp or activation > 2 * mlp
        assert list(storages.values()).count(mlp) == layers
        assert models.kept_weights(twin).handed == all_weights


@pytest.mark.gpu
def test_of_its_own_accord_on_a_gpu(device, long_batch, decoded):
    model = models.qlora().to(device)
    expected = step(patched(model, base_weights="decoded"), long_batch)
    twin = patched(model, graphs="off")
    for _ in range(2):
        decoded.clear()
        same(step(twin, long_batch), expected)
    assert models.kept_weights(twin).handed > 0
    assert decoded["decoded"] == 7 * model.config.num_hidden_layers


def test_bad_input():
    with pytest.raises(OptionError, match="base_weights cannot be 'always'; one of 'auto', 'kept', 'decoded', 'once'"):
        fastplug.Options(base_weights="always")  # type: ignore[arg-type]


class Owner:
    pass


def anything(empty: object) -> object:
    return object()


def test_weights_that_move_all_the_time_are_not_kept():
    kept, owner, made = KeptWeights(True), Owner(), []

    def get(address: int) -> tuple[object, bool]:
        def make(empty: object) -> object:
            made.append(address)
            return object()

        return kept.get([owner], "form", lambda: [(address, 0)], make, torch.device("cpu"))

    first, one = get(0)
    again, two = get(0)
    assert (one, two) == (True, True)
    assert first is again
    for address in range(1, RENEWALS):
        assert get(address)[1]
    assert not get(RENEWALS)[1]
    assert not get(RENEWALS)[1]
    assert made == [*range(RENEWALS), RENEWALS, RENEWALS]
    assert not kept._entries


def test_whose_they_are():
    kept, device = KeptWeights(True), torch.device("cpu")
    assert kept.get([None], "form", list, anything, device)[1] is False
    owner = Owner()
    mine, _ = kept.get([owner], "form", list, anything, device)
    assert kept.get([Owner()], "form", list, anything, device)[0] is not mine
    assert kept.get([owner], "other form", list, anything, device)[0] is not mine
    assert kept.get([owner], "form", list, anything, device)[0] is mine
    assert KeptWeights(False).get([owner], "form", list, anything, device)[1] is False


def test_room_on_a_gpu(monkeypatch):
    free = {"bytes": 60}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    gpu, owners = torch.device("cuda"), [Owner(), Owner()]
    kept = KeptWeights(None)
    assert kept.get(owners[:1], "form", list, anything, gpu)[1]
    free["bytes"] = 50
    assert not kept.get(owners[1:], "form", list, anything, gpu)[1]
    assert KeptWeights(True).get(owners[1:], "form", list, anything, gpu)[1]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not KeptWeights(True).get(owners[1:], "form", list, anything, gpu)[1]
