"""Builders of tiny random models: four families, plain, with LoRA and with LoRA over 4-bit weights.

Weights, norms, biases and LoRA's B are all random and far from their initial values, so that no gradient is trivially
zero and no factor is trivially one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
VOCABULARY = 288
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 9}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
}
_WINDOW: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
}


def plain(family: str = "llama", *, attention: str = "sdpa", window: bool = False, seed: int = 1, **config: Any) -> Any:
    """A two-layer causal LM of width 64 in fp32, in training mode; ``window`` asks for sliding-window attention."""
    import transformers

    config_class, model_class, special = _CLASSES[family]
    values = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    values.update(special, **(_WINDOW[family] if window else {}), **config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = getattr(transformers, config_class)(**values)
        made._attn_implementation = attention
        model = getattr(transformers, model_class)(made)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
            else:
                nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    model.generation_config.pad_token_id = 0
    return model.train()


def lora(model: Any, name: str = "default", seed: int = 2, **options: Any) -> Any:
    """A PEFT model around ``model``; all linears of the layers by default, rank 4, dropout 0."""
    import peft

    options = {"r": 4, "lora_alpha": 12, "target_modules": list(LINEARS), "task_type": "CAUSAL_LM", **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = peft.get_peft_model(model, peft.LoraConfig(**options), adapter_name=name)
        randomize_adapters(made)
    return made.train()


def randomize_adapters(model: nn.Module) -> None:
    """Give every LoRA matrix and every trained copy random values, as training would."""
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)


def quantized(
    model: Any,
    kind: str = "nf4",
    double: bool = True,
    compute_dtype: torch.dtype = torch.float32,
    names: tuple[str, ...] = LINEARS,
) -> Any:
    """Turn the linears of the layers into bitsandbytes 4-bit ones, in place.

    Their widths must be multiples of the block of 64: bitsandbytes' own CPU code decodes others wrongly.
    """
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name in names:
                linear = bnb.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    child.bias is not None,
                    compute_dtype,
                    compress_statistics=double,
                    quant_type=kind,
                )
                linear.load_state_dict(child.state_dict())
                setattr(parent, name, linear.to(child.weight.device))
    model.is_loaded_in_4bit = True
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def qlora(family: str = "llama", kind: str = "nf4", double: bool = True, **config: Any) -> Any:
    """LoRA over 4-bit weights that compute in fp32."""
    return lora(quantized(plain(family, **config), kind, double))


def batch(rows: int = 2, length: int = 13, seed: int = 3, ignored: float = 0.2) -> dict[str, torch.Tensor]:
    """Random tokens with labels, of which a part is ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < ignored, -100)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def kept_weights(model: Any) -> Any:
    """The decoded weights of a patched model that are kept, or handed to the next forward."""
    return next(m.__dict__["_fastplug"] for m in model.modules() if "_fastplug" in m.__dict__).runtime.weights


def prompted(rows: int = 3, length: int = 20, prompt: int = 12) -> dict[str, torch.Tensor]:
    """A batch whose rows begin with a prompt, which has no labels."""
    made = batch(rows, length, ignored=0.0)
    made["labels"][:, :prompt] = -100
    return made


def padded(side: str, rows: int = 3, length: int = 17, seed: int = 4) -> dict[str, torch.Tensor]:
    """A batch whose rows have different lengths, padded on one side; padding has no labels."""
    made = batch(rows, length, seed)
    for row in range(rows):
        count = 4 * row
        where = slice(0, count) if side == "left" else slice(length - count, length)
        made["attention_mask"][row, where] = 0
        made["input_ids"][row, where] = 0
    # The first token of a row is predicted from the padding before it, so it has no label either.
    before = nn.functional.pad(made["attention_mask"], (1, 0), value=0)[:, :-1]
    made["labels"] = made["labels"].masked_fill((made["attention_mask"] & before) == 0, -100)
    return made


def add(model: Any, name: str = "other", seed: int = 5, **options: Any) -> None:
    """A second adapter on a PEFT model, with random values."""
    import peft

    options = {"r": 4, "lora_alpha": 12, "target_modules": list(LINEARS), "task_type": "CAUSAL_LM", **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(name, peft.LoraConfig(**options))
        for parameter_name, parameter in model.named_parameters():
            if f".{name}." in parameter_name:
                parameter.data.add_((torch.randn(parameter.shape) * 0.1).to(parameter))
