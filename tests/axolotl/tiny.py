"""A tiny model, its tokenizer, three datasets and Axolotl configs over them, all in one folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests import models

WORDS = [f"w{index}" for index in range(200)]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def make(folder: Path) -> None:
    """Write ``model/``, ``sft.jsonl``, ``dpo.jsonl`` and ``kto.jsonl`` into ``folder``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, "system", "user", "assistant", *WORDS])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    model = models.plain("llama")
    model.save_pretrained(folder / "model")
    draw = random.Random(5)

    def text() -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(3, 14)))

    rows: dict[str, list[dict[str, Any]]] = {
        "sft": [{"instruction": text(), "input": "", "output": text()} for _ in range(40)],
        "dpo": [{"system": "", "question": text(), "chosen": text(), "rejected": text()} for _ in range(24)],
        "kto": [{"system": "", "question": text(), "completion": text(), "label": i % 2 == 0} for i in range(24)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def config(folder: Path, kind: str = "sft", **changes: Any) -> dict[str, Any]:
    """An Axolotl config for ``kind``: sft, qlora, dpo or kto. Runs on a CPU in fp32, without shuffling surprises."""
    values: dict[str, Any] = {
        "base_model": str(folder / "model"),
        "datasets": [{"path": str(folder / "sft.jsonl"), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(folder / f"prepared-{kind}"),
        "output_dir": str(folder / "out"),
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "sequence_len": 64,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "optimizer": "adamw_torch",
        "learning_rate": 0.01,
        "lr_scheduler": "constant",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 4,
        "seed": 7,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "val_set_size": 0,
        "pad_to_sequence_len": False,
        "special_tokens": {"pad_token": "<pad>"},
    }
    if kind == "qlora":
        values |= {"adapter": "qlora", "load_in_4bit": True}
    if kind in ("dpo", "kto"):
        dataset = {"path": str(folder / f"{kind}.jsonl"), "ds_type": "json", "split": "train"}
        dataset["type"] = "chatml.intel" if kind == "dpo" else "chatml.argilla"
        values |= {"rl": kind, "datasets": [dataset], "remove_unused_columns": False}
    return values | changes
