"""A Trainer on a tiny model and a few random tokens, made the same way with and without fastplug."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import fastplug
from fastplug.patching.sites import KEY
from tests import models

Row = dict[str, torch.Tensor]


def rows(count: int = 32, length: int = 12, seed: int = 5) -> list[Row]:
    """Right-padded rows with differing numbers of tokens and of labels."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        tokens = torch.randint(3, models.VOCABULARY, (length,), generator=generator)
        mask = torch.ones_like(tokens)
        real = length - i % 5
        tokens[real:], mask[real:] = 0, 0
        labels = tokens.masked_fill(mask == 0, -100)
        labels[: (3 * i) % 7] = -100
        made.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return made


def tokens_in(batch: list[Row]) -> int:
    return sum(int(row["attention_mask"].sum()) for row in batch)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=3, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        per_device_train_batch_size=4, per_device_eval_batch_size=4, learning_rate=3e-3, seed=1, data_seed=1,
        use_cpu=True,
    )  # fmt: skip
    return TrainingArguments(**{**values, **changes})


def trainer(model: Any, folder: Path, *callbacks: Any, data: list[Row] | None = None, **changes: Any) -> Trainer:
    """``changes`` go to the TrainingArguments, but for the keys that are the Trainer's own."""
    keys = ("compute_loss_func", "compute_metrics", "model_init", "processing_class")
    own = {key: changes.pop(key) for key in keys if key in changes}
    data = rows() if data is None else data
    return Trainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=data,
        eval_dataset=data[:6],
        callbacks=list(callbacks),
        **own,
    )


def losses(of: Trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in of.state.log_history if key in entry]


def patched(model: nn.Module) -> bool:
    return any(KEY in module.__dict__ for module in model.modules())


def assert_fused(model: nn.Module) -> None:
    """Every site was patched or had nothing to gain, and no call ran an original forward."""
    report = fastplug.report(model)
    assert {d.role for d in report.patched} >= {"lm_head_loss", "decoder_layer"}, report.summary()
    assert not report.refused, report.summary()
    assert not report.fallbacks, report.summary()


def tokenizer() -> PreTrainedTokenizerFast:
    """Words and punctuation, one token each, with the special tokens and a chat template that TRL asks for."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as backends

    words = "the a cat dog sky sea is are blue green warm cold what which why who yes no because it they red".split()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words, ".", "?", ","])}
    backend = Tokenizer(backends.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.model_input_names = ["input_ids", "attention_mask"]  # as a causal LM's tokenizer; generate takes no others
    made.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    made.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} </s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    return made
