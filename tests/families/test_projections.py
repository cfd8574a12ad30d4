"""Adapted projections of modules that run as they are: found in the source, computed in groups, kept after a check."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fastplug
from fastplug.families.reading import shared_inputs
from fastplug.families.structural import NAME
from fastplug.patching.forwards import shared_input
from tests import models
from tests.engine.step import assert_equal, fallbacks, step
from tests.families import cases, sweep

TYPES = (
    "afmoe", "bloom", "deepseek_v3", "falcon", "lfm2", "llama4_text", "minicpm3", "nanochat",
    "opt", "phi",
)  # fmt: skip
BROKEN = ("llama4_text",) if transformers.__version__.startswith("4.51") else ()  # mixes precisions in fp32 models
HERE = [name for name in TYPES if name in sweep.model_types() and name not in BROKEN]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("model_type", HERE)
def test_adapted_types_without_a_row(model_type: str, quantized: bool) -> None:
    """With adapters on all linear layers: none of them is computed by its own forward any more."""
    model = sweep.tiny(model_type)
    names = cases.linears(model)
    if quantized:  # on a CPU bitsandbytes decodes only rows that are multiples of 64 rightly
        odd = {name.rpartition(".")[2] for name, m in model.named_modules() if getattr(m, "in_features", 0) % 64}
        model = models.quantized(model, names=tuple(name for name in names if name not in odd))
    model = models.lora(model, target_modules=list(names))
    twin = copy.deepcopy(model)
    fastplug.apply(twin)
    attention = [d for d in fastplug.report(twin).decisions if d.role == "linear" and "attention" in d.module.lower()]
    assert attention
    assert all(d.status == "patched" and d.family == NAME for d in attention), fastplug.report(twin).summary()
    ours, theirs = step(twin, models.batch()), step(model, models.batch())
    assert sweep.distance(ours, theirs) < 1e-4
    assert abs(float(ours.loss - theirs.loss)) < 1e-5
    assert not fallbacks(twin), fallbacks(twin)


# --- one module, written out ------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """An attention of nobody's: q and k of one tensor, v of another, and the names tell nothing."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        for name in "abcd":
            self.add_module(name, nn.Linear(width, width, bias=name == "b"))
        self.scale = 0.1

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        q, k = self.a(hidden_states), self.b(hidden_states)
        q *= self.scale  # in place
        v = self.c(hidden_states.roll(1, dims=1))
        scores = (q @ k.transpose(1, 2)).softmax(-1)
        return self.d(scores @ v), None


class Twice(Mixing):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return self.d(self.a(hidden_states) * self.b(hidden_states) + self.c(self.a(hidden_states))), None


class Choosing(Mixing):
    """By its source a, b and c read one tensor; c is not called."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        out = self.a(hidden_states) * self.b(hidden_states)
        return self.d(out if self.scale < 1 else out + self.c(hidden_states)), None


def mixed(kind: Callable[[], nn.Module], **options: Any) -> Any:
    model = models.plain()
    torch.manual_seed(6)
    for layer in model.model.layers:
        layer.self_attn = kind()
        layer.__class__ = type("Block", (type(layer),), {"__module__": __name__})
    return models.lora(model, target_modules=["a", "b", "c", "d"], **options)


def groups(model: nn.Module) -> set[tuple[str, ...]]:
    """What the patched modules of the first layer compute together."""
    return set(model.get_submodule("base_model.model.model.layers.0.self_attn").__dict__["_fastplug"].family.shared)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Mixing, {("a", "b"), ("c",), ("d",)}),
        (Twice, {("a",), ("b",), ("c",), ("d",)}),
        (Choosing, {("a",), ("b",), ("c",), ("d",)}),
    ],
)
def test_groups_are_those_of_the_forward(kind: type[Mixing], expected: set[tuple[str, ...]]) -> None:
    model = mixed(kind)
    twin = copy.deepcopy(model)
    fastplug.apply(twin)
    assert groups(twin) == expected
    assert_equal(step(twin, models.padded("left")), step(model, models.padded("left")), 2e-5)
    assert not fallbacks(twin)


def test_a_group_is_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = shared_input.lora_linear

    def counted(group: Any, x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(group.projections))
        return original(group, x)

    model = mixed(Mixing)
    fastplug.apply(model)
    monkeypatch.setattr(shared_input, "lora_linear", counted)
    model(**models.batch())
    assert sizes == [2, 1, 1] * 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_and_checkpointing(checkpointing: bool) -> None:
    """PEFT's random numbers in PEFT's order, also when the layer runs a second time."""
    model = mixed(Mixing, lora_dropout=0.3)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    twin = copy.deepcopy(model)
    fastplug.apply(twin)
    assert_equal(step(twin, models.batch(), logits=False), step(model, models.batch(), logits=False), 2e-5)
    assert not fallbacks(twin)


def test_a_forward_that_changes_its_mind() -> None:
    """Other tensors than at the check, and one that is changed in place between two projections."""
    model = mixed(Mixing)
    twin = copy.deepcopy(model)
    fastplug.apply(twin)

    def changing(self: Mixing, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        x = hidden_states.clone()
        first = self.a(x)
        if not torch.is_grad_enabled():
            x.mul_(2.0)
        return self.d(first + self.b(x)) + self.b(x + 1.0) + self.c(x.view(x.shape)), None

    kind = type("Changing", (Mixing,), {"forward": changing, "__module__": __name__})
    for layer in model.get_base_model().model.layers:
        layer.self_attn.__class__ = kind
    for layer in twin.get_base_model().model.layers:
        layer.self_attn.__dict__["_fastplug"].base = kind
    assert_equal(step(twin, models.batch()), step(model, models.batch()), 2e-5)
    with torch.no_grad():
        inputs = models.batch(2, 70)
        torch.testing.assert_close(twin(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert not fallbacks(twin)


def test_hooks_see_their_calls() -> None:
    model = mixed(Mixing)
    fastplug.apply(model)
    seen: list[Any] = []
    attention = model.get_base_model().model.layers[0].self_attn
    attention.b.register_forward_hook(lambda module, args, out: seen.append(out) or out * 0)
    attention.c.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    model(**models.batch())
    assert len(seen) == 1
    assert fallbacks(model)  # what has hooks runs its own forward


@pytest.mark.parametrize("state", ["disabled", "merged", "second adapter", "dora"])
def test_states_of_the_adapter(state: str) -> None:
    model = mixed(Mixing, use_dora=state == "dora")
    if state == "second adapter":
        models.add(model, target_modules=["a", "b", "c", "d"])
        model.set_adapter("other")
    twin = copy.deepcopy(model)
    fastplug.apply(twin)
    for part in (twin, model):
        if state == "merged":
            part.merge_adapter()
    with model.disable_adapter() if state == "disabled" else torch.enable_grad():
        theirs = model(**models.batch())
    with twin.disable_adapter() if state == "disabled" else torch.enable_grad():
        ours = twin(**models.batch())
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    assert state == "dora" or not fallbacks(twin)


def test_undo_and_second_apply() -> None:
    model = mixed(Mixing)
    kinds = [type(module) for module in model.modules()]
    first = fastplug.apply(model).report
    assert [d.status for d in fastplug.apply(model).report.decisions] == [d.status for d in first.decisions]
    fastplug.undo(model)
    assert [type(module) for module in model.modules()] == kinds
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_without_adapters_nothing_is_gained() -> None:
    model = sweep.tiny("llama") if "llama" in sweep.model_types() else models.plain()
    assert not [d for d in fastplug.apply(model).report.decisions if d.role == "linear"]


def test_the_role_can_be_disabled() -> None:
    model = mixed(Mixing)
    found = [d for d in fastplug.apply(model, disable=("linear",)).report.decisions if d.role == "linear"]
    assert found
    assert all("disabled by the options" in str(d.reason) for d in found)


def test_generation_of_a_model_without_a_row() -> None:
    model = models.lora(sweep.tiny("phi"), target_modules=["q_proj", "k_proj", "v_proj", "dense"]).eval()
    twin = copy.deepcopy(model)
    fastplug.apply(twin)
    prompt = models.batch(2, 70)
    inputs = {"input_ids": prompt["input_ids"], "attention_mask": prompt["attention_mask"]}
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    assert torch.equal(twin.generate(**inputs, **options), model.generate(**inputs, **options))


# --- what the source says ---------------------------------------------------------------------------------------------


class Source:
    def forward(self, x: Any, y: Any) -> Any:
        a, b = self.a(x), self.b(x)  # type: ignore[attr-defined]
        if y is not None:
            c = self.c(x)  # type: ignore[attr-defined]
            x = a + c
        d = self.d(x)  # type: ignore[attr-defined]
        e = self.e(x + 1) + self.f(x)  # type: ignore[attr-defined]
        return self.g(y, 1) + b + d + e  # type: ignore[attr-defined]

    def other(self, x: Any) -> Any:
        return self.h(x)  # type: ignore[attr-defined]


def test_the_source_is_read_in_order() -> None:
    found = {group for group in shared_inputs(Source, "abcdefghi") if len(group) > 1}
    assert found == {("a", "b", "c"), ("d", "f")}
    assert {group for group in shared_inputs(Source, "aci") if len(group) > 1} == {("a", "c")}
    assert shared_inputs(type("Unwritten", (), {}), "ab") == (("a",), ("b",))
