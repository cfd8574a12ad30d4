"""A patched model computes what the unpatched one does: loss, logits and every gradient, in fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import models
from tests.engine.step import assert_equal, assert_parity, fallbacks, patched, step

WINDOWED = ("mistral", "qwen2", "qwen3")
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 2, "down_proj": 9},
    "alpha_pattern": {"v_proj": 40, "up_proj": 3},
}


def biased(family: str) -> Any:
    """A model with a bias wherever its family can have one."""
    options: dict[str, Any] = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {"attention_bias": True}}
    return models.plain(family, **options.get(family, {}))


def trained_bias(family: str) -> Any:
    model = models.lora(biased(family))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)
    return model


CASES: dict[str, Callable[[str], Any]] = {
    "full": lambda family: models.plain(family),
    "full, bias": biased,
    "full, tied head": lambda family: models.plain(family, tie_word_embeddings=True),
    "lora": lambda family: models.lora(models.plain(family)),
    "lora on some": lambda family: models.lora(models.plain(family), target_modules=["q_proj", "v_proj", "down_proj"]),
    "lora on others": lambda family: models.lora(models.plain(family), target_modules=["k_proj", "o_proj", "up_proj"]),
    "lora, trained bias": trained_bias,
    "lora, dropout": lambda family: models.lora(models.plain(family), lora_dropout=0.3),
    "lora, rslora": lambda family: models.lora(models.plain(family), use_rslora=True, r=8),
    "lora, patterns": lambda family: models.lora(models.plain(family), **PATTERNS),
    "lora, patterns and dropout": lambda family: models.lora(models.plain(family), lora_dropout=0.2, **PATTERNS),
    "lora, tied head": lambda family: models.lora(models.plain(family, tie_word_embeddings=True)),
    "lora on the head": lambda family: models.lora(
        models.plain(family), target_modules=[*models.LINEARS, "lm_head"], rank_pattern={"lm_head": 7}
    ),
    "lora, saved head": lambda family: models.lora(models.plain(family), modules_to_save=["lm_head", "embed_tokens"]),
    "lora, saved norms": lambda family: models.lora(models.plain(family), modules_to_save=NORMS),
    "nf4": lambda family: models.qlora(family),
    "nf4, no double quantization": lambda family: models.qlora(family, double=False),
    "fp4": lambda family: models.qlora(family, kind="fp4"),
    "nf4, bias and dropout": lambda family: models.lora(models.quantized(biased(family)), lora_dropout=0.3),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_step_is_equal(family: str, case: str) -> None:
    model = CASES[case](family)
    twin = assert_parity(model, models.batch(), logits=case != "lora on the head")
    gradients = step(twin, models.batch()).gradients
    assert gradients
    assert all(grad is not None for grad in gradients.values())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "window"), [*((f, False) for f in models.FAMILIES), *((f, True) for f in WINDOWED)])
def test_padding_and_windows(family: str, window: bool, side: str, attention: str) -> None:
    """Equal to the unpatched model, and untouched by what stands in the padding: logits and gradients, bit for bit."""
    model = models.lora(models.plain(family, window=window, attention=attention))
    batch = models.padded(side)
    twin = assert_parity(model, batch)
    kept = batch["attention_mask"].bool()
    first = step(twin, batch)
    other = step(twin, {**batch, "input_ids": torch.where(kept, batch["input_ids"], 77)})
    assert first.logits is not None
    assert other.logits is not None
    first.logits, other.logits = first.logits[kept], other.logits[kept]
    assert_equal(other, first, bound=0)


@pytest.mark.parametrize("family", WINDOWED)
def test_window_is_used(family: str) -> None:
    """The sliding-window cases above would pass trivially if the window did not matter."""
    batch = models.batch(length=24)
    narrow, wide = models.plain(family, window=True), models.plain(family, sliding_window=None)
    assert step(patched(narrow), batch).loss != step(patched(wide), batch).loss


def test_full_fine_tuning_ignores_padding() -> None:
    model, batch = models.plain("qwen3"), models.padded("left")
    twin = patched(model)
    kept = batch["attention_mask"].bool()
    first = step(twin, batch, logits=False)
    other = step(twin, {**batch, "input_ids": torch.where(kept, batch["input_ids"], 77)}, logits=False)
    assert_equal(other, first, bound=0)


# --- the arguments of the forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [7, 7.0, torch.tensor(7)])
def test_num_items_in_batch(items: Any) -> None:
    assert_parity(models.lora(models.plain()), {**models.batch(), "num_items_in_batch": items})


def test_shift_labels() -> None:
    batch = models.batch()
    labels = torch.roll(batch["labels"], 1, dims=1)
    assert_parity(models.lora(models.plain()), {**batch, "shift_labels": labels})
    assert_parity(models.lora(models.plain()), {**batch, "shift_labels": labels, "num_items_in_batch": 5})


def test_ignore_index() -> None:
    batch = models.batch()
    labels = batch["labels"].masked_fill(batch["labels"] == -100, 5)
    assert_parity(models.lora(models.plain()), {**batch, "labels": labels, "ignore_index": 5})


@pytest.mark.parametrize("rows", [[1], [0, 1]])
def test_rows_that_are_all_ignored(rows: list[int]) -> None:
    """With nothing to learn from, PyTorch's mean is NaN and its gradient zero; with num_items the loss is zero."""
    batch = models.batch()
    batch["labels"][rows] = -100
    model = models.lora(models.plain())
    assert_parity(model, {**batch, "num_items_in_batch": 9})
    if len(rows) == 1:
        assert_parity(model, batch)
    else:
        twin = patched(model)
        ours, theirs = step(twin, batch), step(model, batch)
        assert ours.loss.isnan()
        assert theirs.loss.isnan()
        for grad in ours.gradients.values():
            assert grad is not None
            assert not grad.any()


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 2), (5, 1)])
def test_smallest_batches(rows: int, length: int) -> None:
    batch = models.batch(rows, length, ignored=0.0)
    model = models.lora(models.plain())
    twin = patched(model)
    assert_equal(step(twin, {**batch, "num_items_in_batch": 3}), step(model, {**batch, "num_items_in_batch": 3}))
    assert not fallbacks(twin)


def test_inputs_embeds_and_position_ids() -> None:
    model = models.lora(models.plain())
    batch = models.batch()
    tokens = batch.pop("input_ids")
    embedded = model.get_input_embeddings()(tokens).detach()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens) + 3
    ours, theirs = embedded.clone().requires_grad_(), embedded.clone().requires_grad_()
    twin = patched(model)
    mine = step(twin, {**batch, "inputs_embeds": ours, "position_ids": positions})
    other = step(model, {**batch, "inputs_embeds": theirs, "position_ids": positions})
    mine.gradients["inputs_embeds"], other.gradients["inputs_embeds"] = ours.grad, theirs.grad
    assert_equal(mine, other)


def test_packed_positions() -> None:
    """Positions that start again inside a row: without a cache transformers cuts attention there, with one not."""
    model, batch = models.lora(models.plain()), models.batch()
    del batch["attention_mask"]
    batch["position_ids"] = torch.cat((torch.arange(6), torch.arange(7))).expand(2, -1)
    for use_cache in (None, True, False):
        assert_parity(model, {**batch, "use_cache": use_cache})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_hidden_states_attentions_and_cache(family: str, attention: str) -> None:
    model = models.lora(models.plain(family, attention=attention))
    twin = patched(model)
    wanted = {"output_hidden_states": True, "use_cache": True, "output_attentions": attention == "eager"}
    ours, theirs = step(twin, models.batch(), **wanted), step(model, models.batch(), **wanted)
    assert_equal(ours, theirs)
    assert len(ours.output.hidden_states) == len(theirs.output.hidden_states) == 3
    for mine, other in zip(ours.output.hidden_states, theirs.output.hidden_states):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    if attention == "eager":
        for mine, other in zip(ours.output.attentions, theirs.output.attentions, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert ours.output.past_key_values.get_seq_length() == theirs.output.past_key_values.get_seq_length() == 13
    # Recording once must not end the fused path.
    before = fallbacks(twin)
    assert_equal(step(twin, models.batch()), step(model, models.batch()))
    assert fallbacks(twin) == before


def test_cache_of_a_long_prefix_in_evaluation() -> None:
    """Long enough for the fused path without gradients: a prefill, then a continuation from its cache."""
    model = models.lora(models.plain("qwen3")).eval()
    twin = patched(model)
    tokens = models.batch(2, 140)["input_ids"]
    for part in (model, twin):
        with torch.no_grad():
            whole = part(input_ids=tokens).logits
            first = part(input_ids=tokens[:, :70], use_cache=True)
            second = part(input_ids=tokens[:, 70:], past_key_values=first.past_key_values, use_cache=True)
        joined = torch.cat((first.logits, second.logits), dim=1)
        torch.testing.assert_close(joined, whole, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(twin(input_ids=tokens).logits, model(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)
    assert not fallbacks(twin)


def test_lazy_logits_carry_gradients() -> None:
    """A host may build its own loss on the logits that come with the model's."""
    model = models.lora(models.plain())
    results = []
    for part in (patched(model), model):
        part.zero_grad()
        output = part(**models.batch())
        (output.loss + output.logits.float().pow(2).mean()).backward()
        results.append({name: p.grad for name, p in part.named_parameters() if p.requires_grad})
    for name, grad in results[0].items():
        torch.testing.assert_close(grad, results[1][name], rtol=1e-4, atol=1e-6)


def test_evaluation_gives_loss_and_logits() -> None:
    model = models.lora(models.plain("qwen2")).eval()
    twin = patched(model)
    batch = models.batch(2, 80)
    with torch.no_grad():
        ours, theirs = twin(**batch), model(**batch)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.logits.detach(), theirs.logits, rtol=1e-5, atol=1e-5)
    assert not fallbacks(twin)
    tuples = [part(**batch, return_dict=False) for part in (twin, model)]
    torch.testing.assert_close(tuples[0][0], tuples[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(tuples[0][1], tuples[1][1], rtol=1e-5, atol=1e-5)
