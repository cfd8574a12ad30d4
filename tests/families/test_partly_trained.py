"""No adapters, or only some tensors trained: every trained tensor gets its gradient, and nothing else gets one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import models
from tests.engine.step import assert_equal, fallbacks, step
from tests.families import cases

BOUND = 2e-5
NAMES = [
    name
    for name in (
        "llama 3",
        "qwen3",
        "gemma 2",
        "phi 3",
        "olmo 2",
        "cohere",
        "glm 4",
        "starcoder 2",
        "gpt-neox",
        "mixtral",
    )
    if cases.available(name)
]
TRAINED: dict[str, Callable[[str], bool]] = {
    "norms": lambda name: "norm" in name,
    "embeddings": lambda name: "embed" in name,
    "head": lambda name: "lm_head" in name or "embed_out" in name,
    "last layer": lambda name: ".1." in name,
    "first layer": lambda name: ".0." in name,
    "biases": lambda name: name.endswith("bias"),
    "attention": lambda name: "attn" in name or "attention." in name,
    "one projection": lambda name: any(part in name for part in ("v_proj", "qkv_proj", "query_key_value")),
    "down": lambda name: any(part in name for part in ("down_proj", "c_proj", "4h_to_h", "experts")),
}


def partly(name: str, trained: Callable[[str], bool], **config: Any) -> Any:
    model = cases.build(name, **config)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(parameter_name))
    return model


@pytest.mark.parametrize("part", TRAINED)
@pytest.mark.parametrize("name", NAMES)
def test_some_tensors(name: str, part: str) -> None:
    model = partly(name, TRAINED[part])
    if not any(parameter.requires_grad for parameter in model.parameters()):
        pytest.skip("the family has none of them")
    twin = cases.fused(name, model)
    ours = step(twin, models.padded("right"))
    assert_equal(ours, step(model, models.padded("right")), BOUND)
    assert all(gradient is not None for gradient in ours.gradients.values())
    assert not fallbacks(twin), fallbacks(twin)


@pytest.mark.parametrize("name", NAMES)
def test_tied_embeddings(name: str) -> None:
    """The one tensor gets the sum of both of its gradients."""
    model = cases.build(name, tie_word_embeddings=True)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied
    twin = cases.fused(name, model)
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight
    assert_equal(step(twin, models.batch()), step(model, models.batch()), BOUND)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_of_a_full_training(name: str) -> None:
    model = partly(name, lambda parameter: ".1." in parameter or "norm" in parameter)
    expected = step(model, models.batch(), logits=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    twin = cases.fused(name, model)
    assert_equal(step(twin, models.batch(), logits=False), expected, BOUND)
    assert not fallbacks(twin)


@pytest.mark.parametrize("name", NAMES)
def test_training_moves_all_of_it(name: str) -> None:
    """Three optimizer steps give the same weights."""
    model = cases.build(name)
    twin = cases.fused(name, model)
    for part in (twin, model):
        optimizer = torch.optim.SGD(part.parameters(), lr=0.01)
        for count in range(3):
            part(**models.batch(seed=count)).loss.backward()
            torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for (name_, mine), other in zip(twin.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name_}: {text}")  # noqa: B023
