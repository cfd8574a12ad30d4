"""A small real tokenizer and a small model of widths that K-quants take, for the GGUF and Ollama tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "The ferry left the harbour an hour late, and nobody on board complained about it.",
    "To repair a bicycle tyre, take the wheel off and lift one side of the tyre over the rim.",
    "In the second year of the survey the number of nesting pairs fell from 214 to 180.",
    "What is the capital of France? Paris is. Why is the sky blue? Because short waves scatter.",
    "def read_table(path):\n    rows = []\n    with open(path) as file:\n        return file.readline()",
]


def tokenizer(added: tuple[str, ...] = ()) -> Any:
    """Byte-level BPE that cuts text as GPT-2 does, with ChatML; llama.cpp's converter does not know its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    made.chat_template = CHATML
    if added:
        made.add_special_tokens({"additional_special_tokens": list(added)})
    return made


def model(vocabulary: int, hidden: int = 256, **config: Any) -> Any:
    """Two Llama layers whose next-token distributions are far from uniform, so that a wrong weight shows."""
    import transformers

    torch.manual_seed(0)
    shape = {
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 128,
        "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 2,
        "initializer_range": 0.05,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **config})).to(torch.bfloat16).eval()


def save(folder: Path, made: Any, tokens: Any) -> Path:
    made.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder
