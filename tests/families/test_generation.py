"""A patched model generates what the unpatched one does, token for token: every mode, before, during, after training.

Prompts are longer than the number of tokens below which a forward is left to the model, so prefills run fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import fastplug
from tests import models
from tests.engine.step import fallbacks, patched
from tests.families import cases

LENGTH = 70
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2, "eos_token_id": 2},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "beam groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "num_return_sequences": 2},
    "quantized cache": {"cache_implementation": "quantized"},
    "offloaded cache": {"cache_implementation": "offloaded"},
    "records": {"output_attentions": True, "output_hidden_states": True, "output_logits": True},
}
KINDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "llama, lora": ("llama 3", cases.adapted),
    "llama, qlora": ("llama 3", cases.quantized),
    "qwen 3, lora": ("qwen3", cases.adapted),
    "gemma 3, lora": ("gemma 3", cases.adapted),
    "cohere 2": ("cohere 2", cases.build),
    "phi 3, qlora": ("phi 3", cases.quantized),
    "gpt-oss, lora": ("gpt-oss", cases.adapted),
}
HERE = [kind for kind, (name, _) in KINDS.items() if cases.available(name)]


def missing(mode: str) -> str | None:
    """Why the installed packages cannot generate so."""
    from transformers import GenerationMixin
    from transformers.utils import is_hqq_available, is_optimum_quanto_available

    moved = {"contrastive": "_contrastive_search", "beam groups": "_group_beam_search"}
    if mode in moved and not hasattr(GenerationMixin, moved[mode]):
        return "transformers has moved it into a repository of the hub, whose code it downloads"
    if mode == "quantized cache" and not (is_optimum_quanto_available() or is_hqq_available()):
        return "needs optimum-quanto or hqq"
    if mode == "offloaded cache" and not torch.cuda.is_available():
        return "offloads from a CUDA device"
    return None


def in_fp32(model: Any) -> Any:
    """On CPUs with instructions for it, bitsandbytes evaluates 4-bit layers in bf16, with other scales: not here."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.fixture(scope="module", params=HERE)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """(patched, unpatched)"""
    name, build = KINDS[request.param]
    model = in_fp32(build(name).to("cuda" if torch.cuda.is_available() else "cpu"))
    for part in (model, model.get_base_model() if hasattr(model, "get_base_model") else model):
        part.generation_config.pad_token_id = 0
    return cases.fused(name, model), model


def prompt(rows: int = 2, length: int = LENGTH, padding: int = 9) -> dict[str, torch.Tensor]:
    made = models.batch(rows, length)
    tokens, mask = made["input_ids"], made["attention_mask"].clone()
    mask[0, :padding] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    torch.manual_seed(5)
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(**inputs, **options, return_dict_in_generate=True)


@pytest.mark.parametrize("mode", MODES)
def test_modes(pair: tuple[Any, Any], mode: str) -> None:
    options, reason = MODES[mode], missing(mode)
    if reason is not None:
        pytest.skip(reason)
    if mode == "quantized cache":
        from transformers.utils import is_optimum_quanto_available

        backend = {"backend": "quanto" if is_optimum_quanto_available() else "hqq", "residual_length": 32}
        options = {**options, "cache_config": {**backend, "q_group_size": 16}}
    if mode == "records" and pair[1].config._attn_implementation != "eager":
        options = {key: value for key, value in options.items() if key != "output_attentions"}
    rows = 1 if mode == "prompt lookup" else 2
    for training in (False, True):
        results: list[Any] = []
        for part in pair:
            part.train(training)
            try:
                results.append(generate(part, prompt(rows, padding=9 if rows > 1 else 0), **options))
            except (ValueError, RuntimeError, TypeError) as error:  # older versions have no such cache for every family
                results.append(error)
        ours, theirs = results
        if isinstance(theirs, Exception):
            assert mode == "quantized cache" or transformers.__version__.startswith("4."), theirs
            assert type(ours) is type(theirs)
            assert str(ours) == str(theirs)
            continue
        assert torch.equal(ours.sequences, theirs.sequences)
        if mode == "records":
            for name in ("hidden_states", "logits", "attentions"):
                for mine, other in zip(getattr(ours, name) or (), getattr(theirs, name) or (), strict=True):
                    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 5, 63, 64])
def test_prompts_of_any_length(pair: tuple[Any, Any], length: int) -> None:
    inputs = prompt(3, length, padding=min(2, length - 1))
    ours, theirs = (generate(part.eval(), inputs) for part in pair)
    assert torch.equal(ours.sequences, theirs.sequences)


def test_a_cache_goes_on(pair: tuple[Any, Any]) -> None:
    """The cache of one call is handed to the next, with more tokens."""
    if pair[1].generation_config.cache_implementation is not None:
        pytest.skip("in this version of transformers the family makes its own cache at every call")
    results = []
    for part in pair:
        first = generate(part.eval(), prompt(1, padding=0))
        grown = torch.cat((first.sequences, first.sequences.new_full((1, 66), 7)), dim=1)
        inputs = {"input_ids": grown, "attention_mask": torch.ones_like(grown)}
        results.append(generate(part, inputs, past_key_values=first.past_key_values).sequences)
    assert torch.equal(*results)


class Rounded:
    """What a layer of a quantized cache keeps, without a package that quantizes: eighths."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return (tensor * 8).round().to(torch.int16)

    def _dequantize(self, stored: torch.Tensor) -> torch.Tensor:
        return stored.float() / 8


@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_that_rounds(pair: tuple[Any, Any], beams: int) -> None:
    """Keys and values come back from the cache as others than were put in; beams reorder them."""
    caches = pytest.importorskip("transformers.cache_utils")
    if not hasattr(caches, "QuantizedLayer") or pair[1].config.model_type in ("gemma3_text", "cohere2", "gpt_oss"):
        pytest.skip("layers of a quantized cache came with 4.56, and none has a window")
    layer = type("RoundedLayer", (Rounded, caches.QuantizedLayer), {})
    if beams > 1 and transformers.__version__.startswith("4."):
        pytest.skip("these versions reorder such a cache wrongly")
    results = []
    for part in pair:
        cache = caches.Cache(layers=[layer(residual_length=4) for _ in range(part.config.num_hidden_layers)])
        inputs = prompt()
        options = {"past_key_values": cache, "num_beams": beams, "max_new_tokens": 8}
        results.append(generate(part.eval(), inputs, **options).sequences)
    assert torch.equal(*results)


def test_a_single_beam_of_many_rows(pair: tuple[Any, Any]) -> None:
    inputs = prompt(8)
    ours, theirs = (generate(part.eval(), inputs, max_new_tokens=3) for part in pair)
    assert torch.equal(ours.sequences, theirs.sequences)


def test_assisted() -> None:
    model, assistant = cases.adapted("llama 3").eval(), cases.build("llama 3", seed=4).eval()
    twin = patched(model)
    ours, theirs = (generate(part, prompt(1, padding=0), assistant_model=assistant) for part in (twin, model))
    assert torch.equal(ours.sequences, theirs.sequences)
    both = generate(twin, prompt(1, padding=0), assistant_model=patched(assistant))
    assert torch.equal(both.sequences, theirs.sequences)


@pytest.mark.parametrize("kind", ["llama, lora", "gemma 3, lora"])
def test_between_training_steps(kind: str) -> None:
    """Generating in the middle of a training, as RL does, and after it; then given back."""
    if kind not in HERE:
        pytest.skip("needs a newer transformers")
    name, build = KINDS[kind]
    model = build(name)
    twin = cases.fused(name, model)
    optimizers = [torch.optim.SGD([p for p in part.parameters() if p.requires_grad], lr=0.05) for part in (twin, model)]
    for count in range(3):
        samples = []
        for part, optimizer in zip((twin, model), optimizers):
            part.train()
            part(**models.batch(seed=count)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            samples.append(generate(part.eval(), prompt()).sequences)
        assert torch.equal(*samples)
    assert not fallbacks(twin)
    fastplug.undo(twin)
    assert torch.equal(generate(twin, prompt()).sequences, samples[1])
