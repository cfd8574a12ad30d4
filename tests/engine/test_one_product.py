"""Layers whose products add the adapters' share themselves, as a GPU's kernel does, take the same step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastplug
from fastplug.ops.low_rank import reference as low_rank
from tests import models
from tests.engine.step import assert_equal, step

pytest.importorskip("peft")


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The reference as a kernel that adds the share; the shapes of its products."""
    shapes: list[tuple[int, ...]] = []

    def exact(y: torch.Tensor, x: Any, w: Any, left: Any, right: Any, alpha: float = 1.0) -> bool:
        shapes.append(tuple(y.shape))
        y.copy_(x.double() @ w.double().t() + alpha * left.double() @ right.double().t())
        return True

    monkeypatch.setattr(low_rank, "product_add", exact)
    return shapes


def stepped(model: Any, **options: Any) -> Any:
    applied = fastplug.apply(model, kernels="reference", graphs="off", **options)
    try:
        return step(model, models.batch())
    finally:
        applied.undo()


@pytest.mark.parametrize("kind", ["lora", "qlora", "dropout"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_same_step(kind: str, family: str, request: pytest.FixtureRequest) -> None:
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
        model = models.qlora(family)
    else:
        model = models.lora(models.plain(family), lora_dropout=0.3 if kind == "dropout" else 0.0)
    apart = stepped(model)
    shapes = request.getfixturevalue("added")
    assert_equal(stepped(model), apart, 1e-5)
    # Of each layer q, k, v, out, gate, up forward (down adds to the residual stream); backward the first of q, k, v,
    # out, gate or up, and down, but with dropout none; the first layer's input needs no gradient.
    layers = len(model.get_base_model().model.layers)
    assert len(shapes) == 6 * layers + (0 if kind == "dropout" else 4 * layers - 1)
