"""A tiny model, its tokenizer, three datasets and Axolotl configs over them, all in one folder; and Axolotl's CLI."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import models

WORDS = [f"w{index}" for index in range(200)]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
# Axolotl draws the adapter before it sets any seed: without this no two runs are equal.
SEEDED = """
import torch
from axolotl.integrations.base import BasePlugin

class Seeded(BasePlugin):
    def post_model_build(self, cfg, model):
        torch.manual_seed(7)
    def post_model_load(self, cfg, model):
        torch.manual_seed(7)
"""


def make(folder: Path) -> None:
    """Write ``model/``, ``sft.jsonl``, ``dpo.jsonl``, ``kto.jsonl`` and ``seeded.py`` into ``folder``."""
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
    models.plain("llama").save_pretrained(folder / "model")
    draw = random.Random(5)

    def text() -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(3, 14)))

    rows: dict[str, list[dict[str, Any]]] = {
        "sft": [{"instruction": text(), "input": "", "output": text()} for _ in range(40)],
        "dpo": [{"system": "", "question": text(), "chosen": text(), "rejected": text()} for _ in range(24)],
        "kto": [{"system": "", "instruction": text(), "completion": text(), "label": i % 2 == 0} for i in range(24)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "seeded.py").write_text(SEEDED)


def config(folder: Path, name: str, kind: str = "sft", **changes: Any) -> Path:
    """Write the Axolotl config ``name`` for a sft, qlora, dpo or kto run on a CPU in fp32; gives its path."""
    values: dict[str, Any] = {
        "base_model": str(folder / "model"),
        "datasets": [{"path": str(folder / "sft.jsonl"), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(folder / f"prepared-{kind}"),
        "output_dir": str(folder / name),
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "sequence_len": 64,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "optimizer": "adamw_torch",
        "learning_rate": 0.01,
        "lr_scheduler": "constant",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "seed": 7,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "val_set_size": 0,
        "pad_to_sequence_len": False,
        "special_tokens": {"pad_token": "<pad>"},
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
    }
    if kind == "qlora":
        values |= {"adapter": "qlora", "load_in_4bit": True}
    if kind in ("dpo", "kto"):
        dataset = {"path": str(folder / f"{kind}.jsonl"), "ds_type": "json", "split": "train"}
        dataset["type"] = "chatml.intel" if kind == "dpo" else "chatml.argilla"
        values |= {"rl": kind, "datasets": [dataset], "remove_unused_columns": False}
    values |= changes
    values["plugins"] = ["seeded.Seeded", *values.get("plugins", ())]
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(values))  # which is YAML
    return path


def axolotl(*arguments: str | Path, folder: Path, fails: bool = False, **variables: str) -> str:
    """Run Axolotl's command line in ``folder``; gives all that it printed."""
    command = Path(sys.executable).with_name("axolotl")
    quiet = {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder), "COLUMNS": "200"}
    quiet["PATH"] = f"{command.parent}{os.pathsep}{os.environ['PATH']}"  # where Axolotl looks for accelerate
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # as a user has it
    done = subprocess.run(
        [command, *arguments], cwd=folder, env={**inherited, **quiet, **variables},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert (done.returncode != 0) is fails, done.stdout[-6000:]
    return done.stdout


def history(folder: Path, key: str = "loss") -> list[float]:
    """What the run that wrote ``folder`` logged at each step."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    entries = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in entries if key in entry]
