"""A model over packed rows: each document as if it were alone, on every path through the model."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fastplug
from fastplug.data import PaddingFreeCollator
from fastplug.errors import DataError
from fastplug.ops.document_attention import DocumentMask, Documents
from fastplug.patching import packed as packed_hook
from fastplug.patching.packed import DocumentsApart, backbones
from tests import models
from tests.data.texts import LENGTHS, documents, looks_for_documents, on, padded
from tests.engine.step import assert_equal, fallbacks, patched, relative, step
from tests.families import cases

pytest.importorskip("peft")

BOUND = 2e-5
CASES = {  # family, whether windows are shorter than the longest document
    "llama": ("llama", False),
    "mistral": ("mistral", True),
    "qwen2, windows in one layer of two": ("qwen2", True),
    "qwen3": ("qwen3", False),
}


def packed(device: torch.device, **options: Any) -> dict[str, Any]:
    return on(device, PaddingFreeCollator(**options)(documents()))


def positions_only(device: torch.device) -> dict[str, Any]:
    return packed(device, cu_seqlens=False)


def losses_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss of each token [B, S - 1]."""
    flat = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100
    )
    return flat.view(labels.shape[0], -1)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of every mask that was made."""
    made: list[int] = []
    original = Documents.mask

    def mask(self: Documents, window: int | None = None) -> torch.Tensor:
        made.append(self.length)
        return original(self, window)

    monkeypatch.setattr(Documents, "mask", mask)
    return made


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=looks_for_documents) if CASES[case][1] else case for case in CASES]
)
def test_every_document_has_the_loss_and_the_gradients_of_the_padded_batch(case: str, device: torch.device) -> None:
    """In fp32, against the same model without fastplug: the loss of each document, and all gradients together."""
    family, window = CASES[case]
    model = models.lora(models.plain(family, window=window)).to(device)
    rows, flat = on(device, padded(documents())), packed(device)
    theirs = step(model, rows)
    twin = patched(model)
    ours = step(twin, flat)
    assert relative(ours.loss, theirs.loss) <= BOUND
    for name, gradient in theirs.gradients.items():
        assert relative(ours.gradients[name], gradient) <= BOUND, name  # type: ignore[arg-type]
    assert ours.logits is not None
    assert theirs.logits is not None
    per_row = losses_of(theirs.logits, rows["labels"]).sum(1)
    starts = torch.tensor([0, *itertools.accumulate(LENGTHS)])[:-1]
    per_token = nn.functional.pad(losses_of(ours.logits, flat["labels"])[0], (1, 0))
    per_document = torch.stack([part.sum() for part in per_token.split(LENGTHS)])
    torch.testing.assert_close(per_document, per_row, rtol=1e-5, atol=1e-5)
    assert len(starts) == len(per_row)
    assert not fallbacks(twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2, windows in one layer of two"])
@pytest.mark.usefixtures("deterministic")
def test_a_changed_token_leaves_all_other_documents_bit_identical(
    case: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Their logits, and the gradients that their losses give to the embeddings and to every adapter."""
    family, window = CASES[case]
    twin = patched(models.lora(models.plain(family, window=window)).to(device, dtype))
    flat = packed(device)
    start, end = sum(LENGTHS[:3]), sum(LENGTHS[:4])  # the document in the middle
    others = torch.ones(sum(LENGTHS), dtype=torch.bool, device=device)
    others[start:end] = False
    flat["labels"] = flat["labels"].masked_fill(~others, -100)  # what the changed one itself learns may change
    results = []
    for token in (5, 6):
        flat["input_ids"][0, start + 1] = token
        embedded = twin.get_input_embeddings()(flat["input_ids"]).detach().requires_grad_()
        inputs = {name: value for name, value in flat.items() if name != "input_ids"}
        taken = step(twin, {**inputs, "inputs_embeds": embedded})
        assert taken.logits is not None
        assert embedded.grad is not None
        results.append([taken.logits[:, others], embedded.grad[:, others], *taken.gradients.values(), taken.logits])
    before, after = results
    assert all(torch.equal(one, other) for one, other in zip(before[:-1], after[:-1]))  # type: ignore[arg-type]
    assert not torch.equal(before[-1], after[-1])  # type: ignore[arg-type]
    assert not fallbacks(twin)


@looks_for_documents
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_same_step_as_transformers_takes(case: str, attention: str, device: torch.device, masks: list[int]) -> None:
    """With and without cu_seqlens; where sdpa is fused, no mask is made."""
    family, window = CASES[case]
    model = models.lora(models.plain(family, attention=attention, window=window)).to(device)
    theirs = step(model, positions_only(device))
    twin = patched(model)
    for batch in (positions_only(device), packed(device), {**packed(device), "use_cache": None}):
        ours = step(twin, batch)
        assert_equal(ours, theirs, BOUND)
    assert not fallbacks(twin)
    if device.type == "cpu":
        assert not masks


# Family -> whether its backbone takes the lazy mask, and whether transformers looks for documents in its positions.
OTHERS = {
    "gemma 2": (False, True),  # eager
    "gemma 3": (True, True),  # windows by layer
    "gpt-neox": (True, True),
    "cohere 2": (True, True),
    "granite moe": (True, True),
    "falcon": (False, False),  # makes something of the mask itself, and hears of no bounds
    "gpt 2": (False, True),
    "llama 4": (False, True),  # chunked attention
    "qwen 2.5 vl": (True, False),  # positions of several axes
}


@looks_for_documents
@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions mean what they mean to transformers; bounds keep documents apart where the backbone hears of them."""
    if not cases.available(name):
        pytest.skip("this version of transformers has no such family")
    lazy, looks = OTHERS[name]
    handed: list[Any] = []
    read = packed_hook._mask
    monkeypatch.setattr(packed_hook, "_mask", lambda *args: handed.append(read(*args)) or handed[-1])
    model = cases.build(name).to(device)
    theirs = step(model, positions_only(device))
    twin = copy.deepcopy(model)
    fastplug.apply(twin)
    ours = step(twin, positions_only(device))
    bounded = step(twin, packed(device))
    assert any(mask is not None for mask in handed) == lazy
    apart = step(model, on(device, padded(documents()))) if lazy and not looks else theirs
    for mine, other in ((ours, theirs), (bounded, apart)):
        assert relative(mine.loss, other.loss) <= BOUND
        for parameter, gradient in other.gradients.items():
            if gradient is not None:
                assert relative(mine.gradients[parameter], gradient) <= BOUND, parameter  # type: ignore[arg-type]


def test_it_is_said_once_that_nobody_keeps_documents_apart(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with windows in transformers before 4.53, which looks for documents nowhere but in FlashAttention."""
    monkeypatch.setattr(packed_hook, "_warned", set())
    monkeypatch.setattr(packed_hook, "_reads_masks", lambda _: packed_hook._Masks(False, False))
    twin = patched(models.lora(models.plain()))
    for _ in range(2):
        twin(**packed(torch.device("cpu")))
    told = [record.message for record in caplog.records if "tell packed documents apart" in record.message]
    assert told == [
        "fastplug: with attention 'sdpa', LlamaModel does not tell packed documents apart, so they see each other; use "
        "attn_implementation='flash_attention_2', or batches with padding"
    ]


@looks_for_documents
def test_without_a_word_about_the_cache_bounds_keep_documents_apart(device: torch.device) -> None:
    """transformers makes a cache then, and lets them see each other; positions alone keep that meaning."""
    model = models.lora(models.plain()).to(device)
    twin = patched(model)
    batch = {name: value for name, value in packed(device).items() if name != "use_cache"}
    apart = step(model, positions_only(device))
    assert_equal(step(twin, batch), apart, BOUND)
    told_by_positions = {name: value for name, value in positions_only(device).items() if name != "use_cache"}
    assert_equal(step(twin, told_by_positions), step(model, told_by_positions), BOUND)
    assert relative(step(twin, told_by_positions).loss, apart.loss) > 1e-3


@looks_for_documents
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, device: torch.device, masks: list[int]) -> None:
    model = models.lora(models.plain()).to(device)
    twin = patched(model)
    for each in (model, twin):
        each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        each.enable_input_require_grads()
    assert_equal(step(twin, packed(device)), step(model, positions_only(device)), BOUND)
    assert not fallbacks(twin)
    if device.type == "cpu":
        assert not masks


@looks_for_documents
def test_a_layer_that_runs_as_it_is_reads_the_mask(device: torch.device, masks: list[int]) -> None:
    """Hooks, parts that are not fused and layers that nobody patched: no path overlooks where documents begin."""
    model = models.lora(models.plain(num_hidden_layers=3)).to(device)
    theirs = step(model, positions_only(device))
    twin = patched(model)
    layers = twin.get_base_model().model.layers
    layers[0].self_attn.register_forward_hook(lambda module, args, output: None)
    layers[1].self_attn.q_proj.lora_A.default.register_forward_hook(lambda module, args, output: None)
    fastplug.undo(layers[2])
    assert_equal(step(twin, packed(device)), theirs, BOUND)
    assert fallbacks(twin)
    assert masks


def test_attention_dropout_leaves_attention_to_the_host(device: torch.device, masks: list[int]) -> None:
    twin = patched(models.lora(models.plain(attention_dropout=0.5)).to(device))
    assert torch.isfinite(step(twin, packed(device)).loss)
    assert masks


def test_attention_host_leaves_masks_to_the_host(device: torch.device) -> None:
    model = models.lora(models.plain()).to(device)
    twin = patched(model, attention="host")
    assert not any(module._forward_pre_hooks for module in twin.modules())
    assert_equal(step(twin, positions_only(device)), step(model, positions_only(device)), BOUND)


def test_evaluation_with_and_without_labels(device: torch.device) -> None:
    model = models.lora(models.plain()).to(device).eval()
    twin = patched(model)
    long = on(device, PaddingFreeCollator()(documents((40, 30, 25))))
    rows = on(device, padded(documents((40, 30, 25))))
    with torch.no_grad():
        theirs, ours = model(**rows), twin(**long)
        assert relative(ours.loss, theirs.loss) <= BOUND
        without = {name: value for name, value in long.items() if name != "labels"}
        logits = twin(**without).logits
    expected = torch.cat([theirs.logits[row, :length] for row, length in enumerate((40, 30, 25))])
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)


def test_a_mask_of_the_hosts_rules(device: torch.device) -> None:
    model = models.lora(models.plain()).to(device)
    batch = packed(device)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert_equal(step(patched(model), batch), step(model, batch), BOUND)


@looks_for_documents
def test_a_registered_attention_function_gets_what_it_reads(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Axolotl registers one that reads the positions in place of ``sdpa``."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = []
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def own(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append((type(args[3]), kwargs["position_ids"] is not None))
        return stock(module, *args, **kwargs)

    model = models.lora(models.plain()).to(device)
    theirs = step(model, positions_only(device))
    twin = patched(model, graphs="on")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", own)
    for _ in range(4):
        assert_equal(step(twin, positions_only(device)), theirs, BOUND)
    assert seen == [(torch.Tensor, True)] * 8


def test_bounds_that_do_not_fit_the_batch() -> None:
    twin = patched(models.lora(models.plain()))
    batch = packed(torch.device("cpu"))
    batch["cu_seq_lens_q"] = batch["cu_seq_lens_q"] + 1
    with pytest.raises(DataError, match="must rise from 0 to the 64 tokens"):
        twin(**batch)


def test_the_hook_is_made_once_copied_pickled_and_undone() -> None:
    model = models.lora(models.plain())
    before = {name: dict(module._forward_pre_hooks) for name, module in model.named_modules()}
    fastplug.apply(model)
    (backbone,) = backbones(model)
    assert backbone is model.get_base_model().model
    fastplug.undo(model.get_base_model().model.layers[0])
    fastplug.apply(model)
    assert [type(hook) for hook in backbone._forward_pre_hooks.values()] == [DocumentsApart]
    (copied,) = backbones(copy.deepcopy(model))
    assert [type(hook) for hook in copied._forward_pre_hooks.values()] == [DocumentsApart]
    loaded = pickle.loads(pickle.dumps(DocumentsApart()))
    assert loaded(backbone, (), {}) is None  # does nothing, and needs no fastplug
    with contextlib.suppress(AttributeError):  # some versions of transformers make models that do not pickle at all
        pickle.dumps(models.plain())
        assert b"DocumentsApart" not in pickle.dumps(model)
        assert torch.isfinite(pickle.loads(pickle.dumps(model))(**packed(torch.device("cpu"))).loss)
    fastplug.undo(model)
    assert {name: dict(module._forward_pre_hooks) for name, module in model.named_modules()} == before


def test_every_layer_gets_the_same_documents(device: torch.device) -> None:
    twin = patched(models.lora(models.plain()).to(device))
    seen: list[DocumentMask] = []
    for layer in twin.get_base_model().model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
    step(twin, packed(device))
    assert len(seen) == 2
    assert seen[0] is seen[1]
    assert type(seen[0]) is DocumentMask
