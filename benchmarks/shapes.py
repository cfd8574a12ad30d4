"""The shapes that are measured: random weights in the dimensions of published models."""

from __future__ import annotations

from typing import Any

LORA = {
    "r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}

_COMMON: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "dtype": "bfloat16"}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "Llama",
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        },
    ),
    "qwen3-8b": (
        "Qwen3",
        {
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
            "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        },
    ),
    "qwen3-0.6b": (
        "Qwen3",
        {
            "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
            "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        },
    ),
    "mistral-7b": (
        "Mistral",
        {
            "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
            "rope_theta": 1000000.0, "rms_norm_eps": 1e-5, "sliding_window": None, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip


def build(shape: str, layers: int | None = None, device: str = "cuda") -> Any:
    """A causal LM of a shape with random bf16 weights on ``device``."""
    import torch
    import transformers

    family, dimensions = SHAPES[shape]
    dimensions = {**_COMMON, **dimensions}
    if layers is not None:
        dimensions["num_hidden_layers"] = layers
    config = getattr(transformers, f"{family}Config")(**dimensions)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return getattr(transformers, f"{family}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(default)


def write(shape: str, path: str, layers: int | None = None) -> None:
    """Save a model of a shape, with a word-level tokenizer, where every system can load it from."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = build(shape, layers)
    model.save_pretrained(path, max_shard_size="4GB")
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    words = special + [f"w{i}" for i in range(len(special), model.config.vocab_size)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(path)
