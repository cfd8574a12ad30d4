"""Rows without a label, prompts and padding, are left out of the head and its loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastplug
from fastplug.patching.forwards import lm_head_loss
from fastplug.patching.forwards.labels import Labels
from tests import models
from tests.engine.step import assert_equal, fallbacks, patched, step
from tests.families import cases

LABELS = 3 * (20 - 12)  # of models.prompted()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """How many rows each loss was computed from; None for all."""
    found: list[int | None] = []
    real = lm_head_loss.linear_cross_entropy

    def recorded(*args: Any, counted: torch.Tensor | None = None, **kwargs: Any) -> Any:
        found.append(None if counted is None else len(counted))
        return real(*args, counted=counted, **kwargs)

    monkeypatch.setattr(lm_head_loss, "linear_cross_entropy", recorded)
    return found


@pytest.mark.parametrize("name", [name for name in ("llama 3", "gemma 2", "cohere", "llava") if cases.available(name)])
@pytest.mark.parametrize("full", [False, True])
def test_same_step_from_the_rows_that_count(name: str, full: bool, counted: list[int | None]) -> None:
    model = cases.build(name)
    if not full:
        model.requires_grad_(False)
        model = models.lora(model)
    twin = cases.fused(name, model)
    batch = models.prompted()
    assert_equal(step(twin, batch), step(model, batch), 2e-5)
    assert counted == [LABELS]
    items = {"num_items_in_batch": torch.tensor(40)}
    assert_equal(step(twin, batch, logits=False, **items), step(model, batch, logits=False, **items), 2e-5)


def test_where_every_token_has_a_label_none_is_picked(counted: list[int | None]) -> None:
    twin = patched(models.qlora())
    step(twin, models.batch(2, 40, ignored=0.0))
    assert counted == [None]  # the last of each row has none, but they are too few


def test_nothing_counts(counted: list[int | None]) -> None:
    model = models.qlora()
    twin = patched(model)
    batch = models.batch()
    batch["labels"].fill_(-100)
    ours, theirs = (step(part, batch, logits=False) for part in (twin, model))
    assert bool(ours.loss.isnan() & theirs.loss.isnan())
    assert counted == [0]
    assert all(gradient is None or not gradient.any() for gradient in ours.gradients.values())
    ours, theirs = (step(part, batch, logits=False, num_items_in_batch=7) for part in (twin, model))
    assert (float(ours.loss), float(theirs.loss)) == (0.0, 0.0)


@pytest.mark.parametrize("memory", ["full", "keep"])
def test_under_a_plan_and_checkpointed(memory: str, counted: list[int | None]) -> None:
    model = models.qlora()
    batch = models.prompted()
    expected = step(model, batch, logits=False)
    twin = patched(model, memory=memory)
    assert_equal(step(twin, batch, logits=False), expected, 2e-5)
    assert counted == [LABELS]
    assert not fallbacks(twin), fallbacks(twin)


def test_adapters_and_a_trained_copy_of_the_head() -> None:
    for options in ({"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}):
        model = models.lora(models.plain(), **options)
        batch = models.prompted()
        assert_equal(step(patched(model), batch, logits=False), step(model, batch, logits=False), 2e-5)


def test_shifted_labels_are_taken_as_they_are() -> None:
    shifted = torch.tensor([[-100, 5, -100, 7], [9, -100, -100, -100]])
    labels = Labels(torch.zeros(2, 4, dtype=torch.int64), {"shift_labels": shifted})
    rows = labels.counted(torch.device("cpu"))
    assert rows is not None
    assert rows.tolist() == [1, 3, 4]
    labels = Labels(shifted, {"ignore_index": 9})
    rows = labels.counted(torch.device("cpu"))
    assert rows is not None
    assert labels.flat.tolist() == [5, -100, 7, 9, -100, -100, -100, 9]
    assert rows.tolist() == [0, 1, 2, 4, 5, 6]


def test_evaluation_without_gradients(counted: list[int | None]) -> None:
    model = models.qlora().eval()
    batch = models.prompted()
    with torch.no_grad():
        expected = model(**batch).loss
        fastplug.apply(model)
        torch.testing.assert_close(model(**batch).loss, expected)
    assert counted == [LABELS]
