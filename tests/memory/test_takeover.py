"""The host's gradient checkpointing under a plan: a permission, and where it cannot be replaced, a reason."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastplug
from fastplug.memory.runtime import planners
from tests import models
from tests.memory.device import gradients, same_bits
from tests.memory.test_runtime import BATCH, LAYERS, kept, planned, wanted

pytest.importorskip("peft")
__all__ = ["wanted"]  # a fixture


def flags(model: Any) -> list[Any]:
    """What the host has set, and what the layers answer."""
    layers = model.get_base_model().model.layers
    return [getattr(layer, "gradient_checkpointing", None) for layer in layers]


def test_checkpointing_is_a_permission_under_a_plan_only(wanted: dict[str, torch.Tensor]) -> None:
    how = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    model, planner, _ = planned("9MiB")
    for _ in range(2):  # before the first step and after it
        model.gradient_checkpointing_enable(**how)
        assert not any(flags(model))
        assert same_bits(gradients(model, BATCH), wanted)
    assert kept(planner) == ["keep"] * LAYERS
    assert not fastplug.report(model).notes
    fastplug.undo(model)
    if hasattr(type(model.get_base_model().model.layers[0]), "gradient_checkpointing"):
        assert all(flags(model))  # what was set meanwhile
    assert model.get_base_model().model.gradient_checkpointing
    fastplug.apply(model)
    if hasattr(type(model.get_base_model().model.layers[0]), "gradient_checkpointing"):
        assert all(flags(model))  # an order again
    model.gradient_checkpointing_disable()
    assert not any(flags(model))


def test_every_other_layer_is_an_order_without_a_plan_and_no_matter_under_one(wanted: dict[str, torch.Tensor]) -> None:
    model, planner, _ = planned("9MiB")
    enable = getattr(model.get_base_model(), "activation_checkpointing_enable", None)
    if enable is None or "every_n_layers" not in inspect.signature(enable).parameters:
        pytest.skip("a later transformers has it")
    enable(every_n_layers=2)
    assert same_bits(gradients(model, BATCH), wanted)
    assert kept(planner) == ["keep"] * LAYERS
    fastplug.undo(model)
    every_other = [index % 2 == 0 for index in range(LAYERS)]
    assert flags(model) == every_other
    fastplug.apply(model)
    assert flags(model) == every_other
    assert same_bits(gradients(model, BATCH), wanted)


def test_a_copy_of_a_planned_model_is_checkpointed_by_the_host() -> None:
    model, _, _ = planned("9MiB")
    model.gradient_checkpointing_enable()
    twin = copy.deepcopy(model)
    assert planners(twin) == []
    if hasattr(type(twin.get_base_model().model.layers[0]), "gradient_checkpointing"):
        assert all(flags(twin))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_from_outside_is_named_and_nothing_is_planned(reentrant: bool) -> None:
    """As ``checkpoint_wrapper`` does, or DeepSpeed."""
    model = models.lora(models.plain(num_hidden_layers=2))
    wanted = gradients(copy.deepcopy(model), BATCH)
    model.enable_input_require_grads()
    fastplug.apply(model, memory="full")
    for layer in model.get_base_model().model.layers:

        def outside(*args: Any, patched: Any = layer.forward, **kwargs: Any) -> Any:
            return checkpoint(lambda x: patched(x, *args[1:], **kwargs), args[0], use_reentrant=reentrant)

        layer.forward = outside
    found = gradients(model, BATCH)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=2e-4, atol=1e-5)
    (planner,) = planners(model)
    assert planner.plan is None
    assert any("checkpoints decoder layers from outside" in note for note in fastplug.report(model).notes)


def test_hooks_on_saved_tensors_are_named() -> None:
    model, planner, _ = planned("9MiB")
    with torch.autograd.graph.save_on_cpu():
        gradients(model, BATCH)
    assert planner.plan is None
    assert any("saved_tensors_hooks" in note for note in fastplug.report(model).notes)


def test_a_cache_in_training_is_left_out_where_the_host_would() -> None:
    model, planner, _ = planned("full")
    labels = {key: value for key, value in BATCH.items() if key != "labels"}
    model(**labels, use_cache=True).logits.float().mean().backward()
    assert planner.plan is None
    assert any("use_cache=False" in note for note in fastplug.report(model).notes)
    model.gradient_checkpointing_enable()
    out = model(**labels, use_cache=True)
    out.logits.float().mean().backward()
    assert kept(planner) == ["residual"] * LAYERS


def test_evaluation_and_generation_make_no_plan() -> None:
    model, planner, _ = planned("5MiB")
    with torch.no_grad():
        model(**BATCH)
    model.eval()
    model(**BATCH)
    model.generate(BATCH["input_ids"][:, :5], max_new_tokens=3, do_sample=False)
    assert planner.plan is None
