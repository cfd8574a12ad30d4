"""Every row, on tiny random models: what a patched model computes is what the unpatched one computes.

All in fp32 on the CPU: loss, logits and every gradient with no adapter, LoRA and QLoRA, gradient checkpointing, the
cache, generation, saving and loading, undoing.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import fastplug
from fastplug.families import fastplug_families
from tests import models
from tests.engine.step import assert_equal, fallbacks, relative, step
from tests.families import cases
from tests.families.sweep import distance

NAMES = [name for name in cases.CASES if cases.available(name)]


every_row = pytest.mark.parametrize("name", NAMES)
BOUND = 2e-5  # twice the engine tests': norms on outputs and large multipliers condition some of these worse
BUILDERS = {"full": cases.build, "lora": cases.adapted, "qlora": cases.quantized}


def test_every_row_has_a_case() -> None:
    assert {row.name for row in fastplug_families()} == {case.row for case in cases.CASES.values()}


@pytest.mark.parametrize("kind", BUILDERS)
@every_row
def test_step_is_equal(name: str, kind: str) -> None:
    """On a batch padded on the left, with all sites patched and no call left to an original forward."""
    model = BUILDERS[kind](name)
    twin = cases.fused(name, model)
    roles = {decision.role: decision for decision in fastplug.report(twin).patched}
    assert not cases.complete(name) or cases.CASES[name].roles <= roles.keys()
    batch = models.padded("left")
    ours = step(twin, batch)
    assert_equal(ours, step(model, batch), BOUND)
    assert not fallbacks(twin), fallbacks(twin)
    if cases.CASES[name].text is None:  # a vision tower gets none from text
        assert all(gradient is not None for gradient in ours.gradients.values())


@every_row
def test_gradient_checkpointing(name: str) -> None:
    model = cases.adapted(name)
    expected = step(model, models.batch(), logits=False)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    twin = cases.fused(name, model)
    assert_equal(step(twin, models.batch(), logits=False), expected, BOUND)
    assert not fallbacks(twin), fallbacks(twin)


@every_row
def test_cache_and_generation(name: str) -> None:
    """Greedy tokens from a padded prompt; long enough for the fused forwards to run the prompt themselves."""
    model = cases.adapted(name).eval()
    twin = cases.fused(name, model)
    prompt = models.batch(2, 70)
    prompt = {"input_ids": prompt["input_ids"], "attention_mask": prompt["attention_mask"].clone()}
    prompt["attention_mask"][0, :9] = 0
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "output_scores": True}
    options.update(return_dict_in_generate=True, eos_token_id=None)
    theirs = model.generate(**prompt, **options)
    ours = twin.generate(**prompt, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, other in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert not fallbacks(twin), fallbacks(twin)


@every_row
def test_save_load_and_undo(name: str, tmp_path: Path) -> None:
    model = cases.build(name)
    before = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    first = step(model, models.batch())
    fastplug.apply(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=cases.CASES[name].attention).train()
    for mine, other in zip(loaded.parameters(), model.parameters(), strict=True):
        mine.requires_grad_(other.requires_grad)  # a checkpoint does not say it
    assert_equal(step(loaded, models.batch()), first, bound=1e-6)
    fastplug.undo(model)
    assert [type(module) for module in model.modules()] == classes
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert_equal(step(model, models.batch()), first, bound=0)


def deviation(ours: Any, truth: Any) -> float:
    """Root mean square error of all gradients together, relative to the fp32 ones."""
    pairs = [(ours.gradients[name].double(), g.double()) for name, g in truth.gradients.items() if g is not None]
    wrong = sum(float((mine - true).square().sum()) for mine, true in pairs)
    return (wrong / sum(float(true.square().sum()) for _, true in pairs)) ** 0.5  # type: ignore[no-any-return]


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", [name for name in NAMES if "dropout" not in name and not cases.mixture(name)])
def test_half_precision(name: str, autocast: bool) -> None:
    """In bf16 the gradients are at most twice as far from the fp32 ones as those of the unpatched model.

    Mixtures are left out: there rounding sends a token to another expert, in one model or the other.
    """
    model = cases.adapted(name)
    truth = step(model, models.batch(), logits=False)
    low = model if autocast else copy.deepcopy(model).to(torch.bfloat16)
    twin = cases.fused(name, low)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = (step(part, models.batch(), logits=False) for part in (twin, low))
    assert deviation(ours, truth) <= 2 * deviation(theirs, truth)
    assert not fallbacks(twin), fallbacks(twin)


@pytest.mark.parametrize("name", [name for name in NAMES if name in ("llava", "gemma 3, seeing", "pixtral")])
def test_with_an_image(name: str) -> None:
    """The vision tower's output enters the residual stream; its own trained tensors get their gradients."""
    model = cases.build(name)
    batch = models.batch()
    batch["input_ids"][:, 2:6] = 5
    batch["pixel_values"] = torch.randn(2, 3, 16, 16)
    if name == "pixtral":
        batch["image_sizes"] = torch.tensor([[16, 16], [16, 16]])
    if name.startswith("gemma"):
        batch["token_type_ids"] = (batch["input_ids"] == 5).long()
    twin = cases.fused(name, model)
    ours, theirs = step(twin, batch), step(model, batch)
    assert relative(ours.loss, theirs.loss) < BOUND
    assert distance(ours, theirs) < BOUND  # the gradient of a key's bias is zero but for rounding
    assert any(gradient is not None for name, gradient in ours.gradients.items() if "vision" in name)
