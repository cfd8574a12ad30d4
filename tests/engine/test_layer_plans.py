"""A decoder layer is read once, and again where anything that it was read from has changed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastplug
from fastplug.graphs import replay
from fastplug.patching.bind import REMEMBERED
from fastplug.patching.forwards import decoder_layer, layer_by_row, layer_plans
from tests import models
from tests.engine.graphs_on_cpu import CPURecorder
from tests.engine.step import relative
from tests.engine.test_graphs import changes, layers
from tests.families import cases

pytest.importorskip("peft")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers that were read."""
    found: list[Any] = []

    def noting(original: Callable[..., Any]) -> Callable[..., Any]:
        def reads(layer: Any, *args: Any) -> Any:
            found.append(layer)
            return original(layer, *args)

        return reads

    for module in (decoder_layer, layer_by_row):
        monkeypatch.setattr(module, "_read", noting(module._read))
    return found


BY_ROW = ("gemma 3", "granite", "olmo 2", "glm 4", "cohere", "starcoder 2, dropout", "stablelm 2 12b")


def adapted(name: str) -> Any:
    if not cases.available(name):
        pytest.skip("this transformers is too old for it")
    return cases.adapted(name)


def gradients(model: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    loss = model(**models.batch(), **kwargs).loss
    if loss.requires_grad:
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def agree(ours: Any, theirs: Any) -> None:
    mine, truth = gradients(ours), gradients(theirs)
    assert mine.keys() == truth.keys()
    for name, value in truth.items():
        assert relative(mine[name], value) <= 2e-5, name


@pytest.mark.parametrize("kind", ["lora", "qlora", *BY_ROW])
def test_a_layer_is_read_once(read: list[Any], kind: str) -> None:
    made = {"lora": lambda: models.lora(models.plain()), "qlora": models.qlora}
    model = made[kind]() if kind in made else adapted(kind)
    fastplug.apply(model, graphs="off")
    for _ in range(3):
        gradients(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.9)  # as an optimizer's step does
    assert len(read) == len(layers(model))


def of_rows() -> Iterator[tuple[str, str, Callable[[Any], Any]]]:
    """What layers by row are read from besides."""

    def everywhere(name: str, value: Any) -> Callable[[Any], None]:
        def change(model: Any) -> None:
            for layer in layers(model):
                module = layer.get_submodule(name.rpartition(".")[0])
                assert hasattr(module, name.rpartition(".")[2])
                setattr(module, name.rpartition(".")[2], value)

        return change

    def replace_norms(model: Any) -> None:
        for layer in layers(model):
            norm = layer.post_attention_layernorm
            norm.weight = torch.nn.Parameter(norm.weight.detach() * 2, requires_grad=False)

    for name, change in changes():
        yield "llama 3", name, change
        yield "granite", name, change
        yield "gemma 3", name, change
    yield "granite", "factor", everywhere("residual_multiplier", 0.9)
    yield "gemma 3", "norm", replace_norms
    yield "starcoder 2, dropout", "dropout", everywhere("mlp.residual_dropout", 0.0)
    yield "cohere", "eps", everywhere("input_layernorm.variance_epsilon", 0.5)


@pytest.mark.parametrize(
    ("family", "name", "change"), list(of_rows()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_changes_is_read_again(read: list[Any], family: str, name: str, change: Callable[[Any], Any]) -> None:
    theirs = adapted(family)
    ours = copy.deepcopy(theirs)
    fastplug.apply(ours, graphs="off")
    agree(ours, theirs)
    read.clear()
    for model in (ours, theirs):
        change(model)
    agree(ours, theirs)
    assert read, name
    agree(ours, theirs)


@pytest.mark.parametrize("name", ["qwen3 moe", "granite moe"])
def test_layers_with_experts_are_read_at_every_call(read: list[Any], name: str) -> None:
    model = adapted(name)
    fastplug.apply(model, graphs="off")
    for _ in range(2):
        gradients(model)
    (expected,) = {read.count(layer) for layer in read}
    assert expected == 2
    assert not any(layer in REMEMBERED for layer in read)


def test_states_that_come_back_are_known(read: list[Any]) -> None:
    """In DPO the reference is the model without its adapter, in every step."""
    theirs = models.lora(models.plain(), lora_dropout=0.0)
    ours = copy.deepcopy(theirs)
    fastplug.apply(ours, graphs="off")
    for _ in range(layer_plans.CHANGES):
        agree(ours, theirs)
        with torch.no_grad(), ours.disable_adapter(), theirs.disable_adapter():
            long = models.batch(2, 80)  # fewer tokens are those of a generation
            assert torch.allclose(ours(**long).loss, theirs(**long).loss)
        for model in (ours, theirs):
            model.eval()
        agree(ours, theirs)
        for model in (ours, theirs):
            model.train()
    assert len(read) == 3 * len(layers(ours))


def test_autocast_and_other_dtypes_have_plans_of_their_own(read: list[Any]) -> None:
    model = models.lora(models.plain())
    fastplug.apply(model, graphs="off")
    wide = gradients(model)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        narrow = gradients(model)["loss"]
    assert wide != narrow
    assert gradients(model)["loss"] == wide
    assert len(read) == 2 * len(layers(model))


def test_several_adapters_are_put_together_in_every_step(read: list[Any]) -> None:
    model = models.lora(models.plain())
    models.add(model)
    model.base_model.set_adapter(["default", "other"])
    theirs = copy.deepcopy(model)
    fastplug.apply(model, graphs="off")
    for _ in range(2):
        agree(model, theirs)
    assert len(read) == 2 * len(layers(model))


def test_what_never_stays_is_not_compared_for_long(read: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.lora(models.plain())
    fastplug.apply(model, graphs="off")
    compared: list[Any] = []
    original = layer_plans.Fingerprint.holds
    monkeypatch.setattr(
        layer_plans.Fingerprint, "holds", lambda self, layer: compared.append(1) or original(self, layer)
    )
    for step in range(layer_plans.CHANGES + 4):
        layers(model)[0].mlp.up_proj.scaling["default"] = 1.0 + step
        gradients(model)
    assert read.count(layers(model)[0]) == layer_plans.CHANGES + 4
    compared.clear()
    gradients(model)
    assert len(compared) == len(layers(model)) - 1


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_a_weight_that_is_replaced_is_freed(graphs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a merge, say, after which nobody may call the layer again."""
    monkeypatch.setattr(replay, "recorder_for", lambda device: CPURecorder())
    model = models.lora(models.plain())
    fastplug.apply(model, graphs=graphs)
    for _ in range(4):
        gradients(model)
    base = layers(model)[0].mlp.up_proj.base_layer
    old = weakref.ref(base.weight)
    base.weight = torch.nn.Parameter(base.weight.detach().clone(), requires_grad=False)
    gc.collect()
    assert old() is None
    gradients(model)


def test_states_of_other_weights_are_forgotten(read: list[Any]) -> None:
    model = models.lora(models.plain())
    fastplug.apply(model, graphs="off")
    gradients(model)
    adapter = weakref.ref(layers(model)[0].mlp.up_proj.lora_A["default"].weight)
    models.add(model)
    model.set_adapter("other")
    model.delete_adapter("default")
    gradients(model)
    gc.collect()
    assert adapter() is None
    assert len(read) == 2 * len(layers(model))


def test_nothing_keeps_a_model_or_an_undone_layer() -> None:
    model = models.lora(models.plain())
    applied = fastplug.apply(model, graphs="off")
    gradients(model)
    assert all(layer in REMEMBERED for layer in layers(model))
    applied.undo()
    assert not any(layer in REMEMBERED for layer in layers(model))
    fastplug.apply(model, graphs="off")
    gradients(model)
    weight = weakref.ref(layers(model)[0].mlp.up_proj.base_layer.weight)
    applied = None
    gc.collect()
    gc.disable()
    try:
        del model
        gone = weight() is None
    finally:
        gc.enable()
    gc.collect()
    assert weight() is None
    assert gone or _cycles_without_us()


def _cycles_without_us() -> bool:
    """Whether a model of this kind is part of a cycle by itself, so that it waits for the collector anyway."""
    model = models.lora(models.plain())
    weight = weakref.ref(model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        return weight() is not None
    finally:
        gc.enable()
