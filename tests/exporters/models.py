"""Tiny real models for the exporter tests, with adapters whose B is not zero."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

VOCABULARY = 96
DTYPE = "torch_dtype" if importlib.metadata.version("transformers").startswith("4.") else "dtype"


def llama(tied: bool = False, dtype: torch.dtype = torch.bfloat16, kind: str = "llama", **config: Any) -> Any:
    """A two-layer model; ``kind`` is ``llama``, ``qwen3`` or ``qwen3_moe``."""
    import transformers

    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
        "tie_word_embeddings": tied, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **config}))
    elif kind == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**shape, **config}))
    else:
        moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**{**shape, **moe, **config}))
    model = model.to(dtype).eval()
    setattr(model.config, DTYPE, dtype)
    return model


def quantized(folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """A Llama saved to ``folder`` and loaded in bitsandbytes 4-bit (or what ``options`` say)."""
    import transformers

    if transformers.__version__.startswith("4.51") and not torch.cuda.is_available():
        pytest.skip("this transformers wants intel_extension_for_pytorch for bitsandbytes on a CPU")
    llama(dtype=dtype).save_pretrained(folder)
    options = options or {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    }
    config = transformers.BitsAndBytesConfig(**options)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **{DTYPE: dtype})


def train(model: nn.Module, scale: float = 0.02) -> Any:
    """Give every adapter tensor random values, as training would."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta")):
            noise = torch.randn(parameter.shape, device=parameter.device) * scale
            parameter.data.add_(noise.to(parameter.dtype))
    return model


def adapted(model: Any, name: str = "default", **options: Any) -> Any:
    """``model`` with a trained LoRA adapter."""
    import peft

    unknown = options.keys() - {field.name for field in dataclasses.fields(peft.LoraConfig)}
    if unknown:
        pytest.skip(f"this PEFT has no {', '.join(unknown)}")
    options = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return train(peft.get_peft_model(model, peft.LoraConfig(**options), adapter_name=name)).eval()


def logits(model: Any) -> torch.Tensor:
    """Logits of a fixed prompt, fp32."""
    device = next(model.parameters()).device
    tokens = torch.arange(3, 35, device=device).view(2, 16)
    with torch.no_grad():
        return model(input_ids=tokens).logits.float().cpu()  # type: ignore[no-any-return]


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors folder, through the safetensors library."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not tensors.keys() & part.keys()
        tensors.update(part)
    return tensors
