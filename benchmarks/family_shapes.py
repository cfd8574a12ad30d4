"""A popular size of every family that has a row: real widths, few layers, random weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

# Small vision towers: the steps read text, so that the text towers are what is measured.
VISION: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 2, "num_heads": 2, "num_hidden_layers": 2, "depth": 2,
    "intermediate_size": 128, "image_size": 28, "patch_size": 14, "spatial_merge_size": 1, "temporal_patch_size": 1,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "head_dim": 32, "fullatt_block_indexes": [0],
    "window_size": 28, "in_channels": 3,
}  # fmt: skip
TOY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 512, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 64, "sliding_window": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_num_experts": 4, "moe_k": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "shared_intermediate_size": 64,
    "intermediate_size_mlp": 128, "n_embd": 64, "n_head": 4, "ffn_hidden_size": 128, "kv_lora_rank": 64,
    "q_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "out_hidden_size": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One model: its classes in transformers, its dimensions, and ``pattern``: values that repeat over its layers."""

    size: str
    classes: tuple[str, str]
    config: dict[str, Any]
    pattern: dict[str, Sequence[Any]] = field(default_factory=dict)
    text: dict[str, Any] | None = None  # of a model that sees: its text tower
    attention: str = "sdpa"
    quantized: bool = True


def dims(hidden: int, mlp: int, heads: int, kv: int, vocabulary: int, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": mlp, "num_attention_heads": heads, "num_key_value_heads": kv,
        "vocab_size": vocabulary, **others,
    }  # fmt: skip


def causal(prefix: str, size: str, config: dict[str, Any], **others: Any) -> Shape:
    return Shape(size, (f"{prefix}Config", f"{prefix}ForCausalLM"), config, **others)


def seeing(prefix: str, size: str, text: dict[str, Any], **config: Any) -> Shape:
    classes = (f"{prefix}Config", f"{prefix}ForConditionalGeneration")
    return Shape(size, classes, {"image_token_id": 5, "image_token_index": 5, **config}, text=text)


WINDOWS: dict[str, Sequence[Any]] = {"layer_types": ("sliding_attention", "full_attention")}
MOST_WINDOWS: dict[str, Sequence[Any]] = {"layer_types": ("sliding_attention",) * 3 + ("full_attention",)}
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
HEADLINE = ("qwen3", "gemma3", "phi3", "granite")

SHAPES: dict[str, Shape] = {
    "qwen3": causal("Qwen3", "8B", dims(4096, 12288, 32, 8, 151936, head_dim=128)),
    "gemma3": Shape(
        "12B",
        ("Gemma3TextConfig", "Gemma3ForCausalLM"),
        dims(3840, 15360, 16, 8, 262208, head_dim=256, sliding_window=1024),
        pattern=MOST_WINDOWS,
    ),
    "phi3": causal("Phi3", "phi-4 14B", dims(5120, 17920, 40, 10, 100352)),
    "granite": causal(
        "Granite",
        "3.3 8B",
        dims(
            4096, 12800, 32, 8, 49159,
            embedding_multiplier=12.0, attention_multiplier=0.0078125, residual_multiplier=0.22, logits_scaling=16.0,
        ),
    ),
    "llama": causal("Llama", "3.1 8B", dims(4096, 14336, 32, 8, 128256)),
    "mistral": causal("Mistral", "7B", dims(4096, 14336, 32, 8, 32768, sliding_window=None)),
    "ministral": causal(
        "Ministral", "8B", dims(4096, 12288, 32, 8, 131072, head_dim=128, sliding_window=1024), pattern=MOST_WINDOWS
    ),
    "qwen2": causal("Qwen2", "2.5 7B", dims(3584, 18944, 28, 4, 152064)),
    "gemma": causal("Gemma", "7B", dims(3072, 24576, 16, 16, 256000, head_dim=256)),
    "gemma2": causal(
        "Gemma2",
        "9B",
        dims(3584, 14336, 16, 8, 256000, head_dim=256, sliding_window=1024, query_pre_attn_scalar=256),
        attention="eager",  # sdpa has no softcap
    ),
    "smollm3": causal(
        "SmolLM3", "3B", dims(2048, 11008, 16, 4, 128256), pattern={"no_rope_layers": (1, 0)}
    ),
    "olmo2": causal("Olmo2", "7B", dims(4096, 11008, 32, 32, 100352)),
    "olmo3": causal("Olmo3", "7B", dims(4096, 11008, 32, 32, 100278, sliding_window=1024), pattern=MOST_WINDOWS),
    "glm": causal("Glm", "9B", dims(4096, 13696, 32, 2, 151552, head_dim=128)),
    "glm4": causal("Glm4", "9B", dims(4096, 13696, 32, 2, 151552, head_dim=128)),
    "cohere": causal("Cohere", "Aya 8B", dims(4096, 14336, 32, 8, 256000, logit_scale=0.125)),
    "cohere2": causal(
        "Cohere2",
        "R7B",
        dims(4096, 14336, 32, 8, 256000, logit_scale=0.25, sliding_window=1024),
        pattern=MOST_WINDOWS,
    ),
    "starcoder2": causal("Starcoder2", "7B", dims(4608, 18432, 36, 4, 49152, sliding_window=None)),
    "stablelm": causal(
        "StableLm", "2 12B", dims(5120, 13824, 32, 8, 100352, qk_layernorm=True, use_parallel_residual=True)
    ),
    "gpt_neox": causal("GPTNeoX", "Pythia 6.9B", dims(4096, 16384, 32, 32, 50432)),
    "arcee": causal("Arcee", "AFM 4.5B", dims(2560, 18432, 20, 4, 128004, head_dim=128)),
    "ministral3": causal(
        "Ministral3",
        "8B",
        dims(
            4096, 14336, 32, 8, 131072, head_dim=128, sliding_window=None,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "original_max_position_embeddings": 16384, "llama_4_scaling_beta": 0.1,
            },
        ),
    ),
    "exaone4": causal(
        "Exaone4",
        "32B",
        dims(5120, 27392, 40, 8, 102400, head_dim=128, sliding_window=1024, sliding_window_pattern=4),
        pattern=WINDOWS,
    ),
    "seed_oss": causal(
        "SeedOss", "36B", dims(5120, 27648, 80, 8, 155136, head_dim=128, attention_dropout=0.0, residual_dropout=0.0)
    ),
    "cwm": causal("Cwm", "32B", dims(6144, 21504, 48, 8, 128256, head_dim=128, sliding_window=1024), pattern=WINDOWS),
    "ernie4_5": causal("Ernie4_5", "0.3B", dims(1024, 3072, 16, 2, 103424, head_dim=128)),
    "helium": causal("Helium", "2B", dims(2560, 7040, 20, 20, 48000, head_dim=128)),
    "apertus": causal("Apertus", "8B", dims(4096, 21504, 32, 8, 131072)),
    "nemotron": causal(
        "Nemotron", "Mini 4B", dims(3072, 9216, 24, 8, 256000, head_dim=128, partial_rotary_factor=0.5)
    ),
    "qwen2_5_vl": seeing("Qwen2_5_VL", "7B", dims(3584, 18944, 28, 4, 152064, rope_parameters=MROPE)),
    "qwen3_vl": seeing("Qwen3VL", "8B", dims(4096, 12288, 32, 8, 151936, head_dim=128, rope_parameters=MROPE)),
    "llava": seeing("Llava", "1.5 7B", dims(4096, 11008, 32, 32, 32064, model_type="llama"), image_seq_length=4),
    "mistral3": seeing("Mistral3", "24B", dims(5120, 32768, 32, 8, 131072, head_dim=128, model_type="mistral")),
    "pixtral": seeing(
        "Llava",
        "12B",
        dims(5120, 14336, 32, 8, 131072, head_dim=128, model_type="mistral", sliding_window=None),
        vision_config={**VISION, "model_type": "pixtral"},
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=4,
    ),
    "gemma4": Shape(
        "E4B",
        ("Gemma4TextConfig", "Gemma4ForCausalLM"),
        dims(2560, 10240, 8, 2, 262144, head_dim=256, sliding_window=512, hidden_size_per_layer_input=256),
        pattern=WINDOWS,
    ),
    "falcon": causal("Falcon", "7B", {"hidden_size": 4544, "num_attention_heads": 71, "vocab_size": 65024}),
    "gpt2": Shape(
        "XL",
        ("GPT2Config", "GPT2LMHeadModel"),
        {
            "n_embd": 1600, "n_head": 25, "vocab_size": 50257, "n_positions": 2048,
            "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
        },
        quantized=False,
    ),
    "qwen2_moe": causal(
        "Qwen2Moe",
        "1.5 A2.7B",
        dims(
            2048, 5632, 16, 16, 151936,
            num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
        ),
    ),
    "qwen3_moe": causal(
        "Qwen3Moe",
        "30B-A3B",
        dims(
            2048, 6144, 32, 4, 151936,
            head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        ),
    ),
    "olmoe": causal(
        "Olmoe", "7B-A1B", dims(2048, 1024, 16, 16, 50304, num_experts=64, num_experts_per_tok=8)
    ),
    "mixtral": causal(
        "Mixtral", "8x7B", dims(4096, 14336, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2)
    ),
    "gpt_oss": causal(
        "GptOss",
        "20B",
        dims(
            2880, 2880, 64, 8, 201088, head_dim=64, num_local_experts=32, num_experts_per_tok=4, sliding_window=128
        ),
        pattern=WINDOWS,
        attention="eager",  # sdpa has no sinks
    ),
    "glm4_moe": causal(
        "Glm4Moe",
        "4.5 Air",
        dims(
            4096, 10944, 96, 8, 151552, head_dim=128, use_qk_norm=True, n_routed_experts=128, n_shared_experts=1,
            num_experts_per_tok=8, moe_intermediate_size=1408, n_group=1, topk_group=1, first_k_dense_replace=1,
        ),
    ),
    "granitemoe": causal(
        "GraniteMoe",
        "1B-A400M",
        dims(
            1024, 512, 16, 8, 49155, num_local_experts=32, num_experts_per_tok=8,
            embedding_multiplier=12.0, attention_multiplier=0.015625, residual_multiplier=0.22, logits_scaling=6.0,
        ),
    ),
    "ernie4_5_moe": causal(
        "Ernie4_5_Moe",
        "21B-A3B",
        dims(
            2560, 12288, 20, 4, 103424, moe_num_experts=64, moe_k=6, moe_intermediate_size=1536,
            moe_layer_start_index=1, moe_layer_end_index=-1,
        ),
    ),
    "phimoe": causal("Phimoe", "3.5", dims(4096, 6400, 32, 8, 32064, num_local_experts=16, num_experts_per_tok=2)),
    "dots1": causal(
        "Dots1",
        "142B-A14B",
        dims(
            4096, 10944, 32, 32, 152064, head_dim=128, n_routed_experts=128, n_shared_experts=2, num_experts_per_tok=6,
            moe_intermediate_size=1408, n_group=1, topk_group=1, first_k_dense_replace=1,
        ),
        pattern={"layer_types": ("full_attention",)},
    ),
    "minimax_m2": causal(
        "MiniMaxM2",
        "230B-A10B",
        dims(3072, 1536, 48, 8, 200064, head_dim=128, num_local_experts=256, num_experts_per_tok=8),
    ),
    "llama4": Shape(
        "Scout 17B-16E",
        ("Llama4TextConfig", "Llama4ForCausalLM"),
        dims(5120, 8192, 40, 8, 202048, head_dim=128, intermediate_size_mlp=16384, num_local_experts=16),
    ),
}  # fmt: skip


def build(shape: Shape, layers: int, device: torch.device, dtype: torch.dtype, toy: bool = False) -> Any:
    """A model of a shape with random weights, made on the device.

    Raises:
        AttributeError: The installed transformers does not have the family.
    """
    import transformers

    values: dict[str, Any] = {"num_hidden_layers": layers, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    repeated = {key: [kinds[i % len(kinds)] for i in range(layers)] for key, kinds in shape.pattern.items()}
    values.update(shape.config if shape.text is None else shape.text, **repeated)
    values.setdefault("tie_word_embeddings", False)
    vision = dict(shape.config.get("vision_config", VISION)) if shape.text is not None else {}
    if toy:
        values.update({key: TOY[key] for key in values if key in TOY and values[key] is not None})
        if "mrope_section" in values.get("rope_parameters", {}):
            values["rope_parameters"] = {**values["rope_parameters"], "mrope_section": [2, 3, 3]}
    if shape.text is not None:
        vision["out_hidden_size"] = values["hidden_size"]
        values = {**shape.config, "text_config": values, "vision_config": vision, "tie_word_embeddings": False}
    config_class, model_class = shape.classes
    config = getattr(transformers, config_class)(**values)
    config._attn_implementation = shape.attention
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = getattr(transformers, model_class)(config)
    finally:
        torch.set_default_dtype(default)
    return model.requires_grad_(False).train()


def linears(model: nn.Module) -> list[str]:
    """Full names of the linear layers in the decoder layers; routers and vision towers left out."""
    kinds = (nn.Linear, _conv1d())
    layer = re.compile(r"(^|\.)(layers|h)\.\d+\.")
    inside = [name for name, m in model.named_modules() if isinstance(m, kinds) and layer.search(name)]
    inside = [name for name in inside if not {"vision_tower", "visual", "vision_model"} & set(name.split("."))]
    routers = ("gate", "router", "shared_expert_gate", "per_layer_input_gate", "per_layer_projection")
    return [name for name in inside if name.rpartition(".")[2] not in routers]


def _conv1d() -> type:
    from transformers.pytorch_utils import Conv1D

    return Conv1D  # type: ignore[no-any-return]


def quantize(model: Any, names: Sequence[str], compute_dtype: torch.dtype) -> None:
    """Turn the named linear layers into bitsandbytes' NF4 with double quantization, in place and where they are."""
    import bitsandbytes as bnb

    for name in names:
        parent_name, _, child_name = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        old = getattr(parent, child_name)
        new = bnb.nn.Linear4bit(
            old.in_features, old.out_features, False, compute_dtype, True, "nf4", device=torch.device("meta")
        )
        weight = bnb.nn.Params4bit(old.weight.data, False, compress_statistics=True, quant_type="nf4", module=new)
        new.weight = weight.to(old.weight.device)
        new.bias = old.bias
        setattr(parent, child_name, new)
    model.is_loaded_in_4bit = True
