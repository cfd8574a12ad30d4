"""Tiny random models, one or more for every row: each with what sets its family apart made visible.

Windows are shorter than the batches, softcaps bite, multipliers are far from one, every second layer is of another
kind where the family mixes kinds.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

import fastplug
from tests import models
from tests.engine.step import patched

MIXED: dict[str, Any] = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
HALF: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Case:
    """How to build one model: ``classes`` are (config, model) of transformers; ``config`` what differs from a Llama."""

    row: str
    classes: tuple[str, str]
    config: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    text: dict[str, Any] | None = None  # of a model that sees: what differs in its text tower
    since: str = "4.51"  # the first transformers version whose classes the row describes in all roles
    oldest: str = "4.51"  # before, the tiny config does not build or run
    roles: frozenset[str] = frozenset({"decoder_layer", "attention", "lm_head_loss"})  # that must be patched


def llama_like(row: str, prefix: str, attention: str = "sdpa", config_class: str | None = None, **config: Any) -> Case:
    return Case(row, (config_class or f"{prefix}Config", f"{prefix}ForCausalLM"), config, attention)


CASES: dict[str, Case] = {
    "llama 2": llama_like("llama", "Llama", num_key_value_heads=4),
    "llama 3": llama_like("llama", "Llama"),
    "mistral": llama_like("mistral", "Mistral", sliding_window=5),
    "ministral": llama_like("ministral", "Ministral", head_dim=32, **MIXED),
    "mixtral": llama_like("mixtral", "Mixtral", num_local_experts=4, sliding_window=5),
    "qwen2": llama_like("qwen2", "Qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen2 moe": llama_like(
        "qwen2_moe", "Qwen2Moe", shared_expert_intermediate_size=64, mlp_only_layers=[1], **EXPERTS
    ),
    "qwen3": llama_like("qwen3", "Qwen3", head_dim=32),
    "qwen3 moe": llama_like("qwen3_moe", "Qwen3Moe", head_dim=32, mlp_only_layers=[1], **EXPERTS),
    "gemma": llama_like("gemma", "Gemma", head_dim=32),
    "gemma 2": llama_like(
        "gemma2",
        "Gemma2",
        attention="eager",  # sdpa has no softcap
        head_dim=32,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        sliding_window=5,
    ),
    "gemma 3": llama_like("gemma3", "Gemma3", config_class="Gemma3TextConfig", head_dim=32, **MIXED),
    "phi 3": llama_like("phi3", "Phi3", sliding_window=5),
    "phi 4 mini": llama_like("phi3", "Phi3", **HALF),
    "phi 3, dropout": llama_like("phi3", "Phi3", resid_pdrop=0.3),
    "granite": llama_like(
        "granite",
        "Granite",
        embedding_multiplier=2.0,
        attention_multiplier=0.1,
        residual_multiplier=0.3,
        logits_scaling=3.0,
    ),
    "smollm 3": llama_like("smollm3", "SmolLM3", no_rope_layers=[1, 0], use_sliding_window=True, **MIXED),
    "olmo 2": llama_like("olmo2", "Olmo2"),
    "olmo 3": llama_like("olmo3", "Olmo3", **MIXED),
    "olmoe": llama_like("olmoe", "Olmoe", num_experts=4, num_experts_per_tok=2),
    "glm": llama_like("glm", "Glm", head_dim=16),
    "glm 4": llama_like("glm4", "Glm4", head_dim=16),
    "cohere": llama_like("cohere", "Cohere", logit_scale=0.3),
    "cohere, q/k norm": llama_like("cohere", "Cohere", logit_scale=0.3, use_qk_norm=True),
    "cohere 2": llama_like("cohere2", "Cohere2", logit_scale=0.3, **MIXED),
    "starcoder 2": llama_like("starcoder2", "Starcoder2", sliding_window=5),
    "starcoder 2, dropout": llama_like("starcoder2", "Starcoder2", residual_dropout=0.3),
    "stablelm": llama_like("stablelm", "StableLm", use_qkv_bias=True),
    "stablelm 2 12b": llama_like("stablelm", "StableLm", qk_layernorm=True, use_parallel_residual=True),
    "gpt-neox": llama_like("gpt_neox", "GPTNeoX"),
    "gpt-neox, sequential": llama_like("gpt_neox", "GPTNeoX", use_parallel_residual=False, hidden_dropout=0.3),
    "gpt-oss": llama_like(
        "gpt_oss", "GptOss", attention="eager", num_local_experts=4, num_experts_per_tok=2, head_dim=32, **MIXED
    ),
}

EXPERTS_BESIDE: dict[str, Any] = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
CASES.update(
    {
        "arcee": llama_like("arcee", "Arcee"),
        "cwm": llama_like("cwm", "Cwm", **MIXED),
        "glm 4.5": llama_like("glm4_moe", "Glm4Moe", use_qk_norm=True, head_dim=32, **EXPERTS_BESIDE, **EXPERTS),
        "granite moe": llama_like(
            "granitemoe",
            "GraniteMoe",
            num_local_experts=4,
            num_experts_per_tok=2,
            embedding_multiplier=2.0,
            attention_multiplier=0.1,
            residual_multiplier=0.3,
            logits_scaling=3.0,
        ),
        "ernie 4.5": llama_like("ernie4_5", "Ernie4_5", head_dim=32),
        "ernie 4.5 moe": llama_like(
            "ernie4_5_moe",
            "Ernie4_5_Moe",
            moe_num_experts=4,
            moe_k=2,
            moe_intermediate_size=64,
            moe_layer_start_index=1,
            moe_layer_end_index=-1,
        ),
        "helium": llama_like("helium", "Helium", head_dim=16),
        "apertus": llama_like("apertus", "Apertus"),
        "nemotron": llama_like("nemotron", "Nemotron", partial_rotary_factor=0.5, head_dim=16),
        "phi 3.5 moe": llama_like("phimoe", "Phimoe", num_local_experts=4, num_experts_per_tok=2),
        "dots 1": llama_like("dots1", "Dots1", head_dim=32, n_shared_experts=1, **EXPERTS_BESIDE, **MIXED, **EXPERTS),
        "exaone 4": llama_like("exaone4", "Exaone4", head_dim=32, sliding_window_pattern=2, **MIXED),
        "exaone 4, no windows": llama_like(
            "exaone4", "Exaone4", sliding_window=None, layer_types=["full_attention"] * 2
        ),
        "ministral 3": llama_like(
            "ministral3",
            "Ministral3",
            head_dim=32,
            sliding_window=5,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 4,
                "llama_4_scaling_beta": 0.7,
            },
        ),
        "seed oss": llama_like("seed_oss", "SeedOss", head_dim=32, attention_dropout=0.0, residual_dropout=0.0),
        "seed oss, dropout": llama_like("seed_oss", "SeedOss", attention_dropout=0.0, residual_dropout=0.3),
        "minimax m2": llama_like("minimax_m2", "MiniMaxM2", num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    }
)

PARTS = frozenset({"mlp", "lm_head_loss"})
VISION: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 2, "num_heads": 2, "num_hidden_layers": 2, "depth": 2,
    "intermediate_size": 64, "image_size": 16, "patch_size": 8, "out_hidden_size": 64, "spatial_merge_size": 1,
    "temporal_patch_size": 1, "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "head_dim": 16,
    "fullatt_block_indexes": [0], "window_size": 16, "in_channels": 3,
}  # fmt: skip


def seeing(row: str, prefix: str, text: dict[str, Any], **config: Any) -> Case:
    classes = (f"{prefix}Config", f"{prefix}ForConditionalGeneration")
    return Case(row, classes, {"image_token_id": 5, "image_token_index": 5, **config}, text=text)


CASES.update(
    {
        "gemma 4": Case(
            "gemma4",
            ("Gemma4TextConfig", "Gemma4ForCausalLM"),
            {"head_dim": 32, "vocab_size_per_layer_input": models.VOCABULARY, "num_kv_shared_layers": 0, **MIXED},
            roles=PARTS,
        ),
        "llama 4": Case(
            "llama4",
            ("Llama4TextConfig", "Llama4ForCausalLM"),
            {"num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 128, "head_dim": 16},
            roles=PARTS,
        ),
        "falcon": Case(
            "falcon",
            ("FalconConfig", "FalconForCausalLM"),
            {"ffn_hidden_size": 128, "intermediate_size": None, "num_key_value_heads": None},
            roles=PARTS,
        ),
        "gpt 2": Case(
            "gpt2",
            ("GPT2Config", "GPT2LMHeadModel"),
            {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
            roles=frozenset({"lm_head_loss"}),
        ),
        "qwen 2.5 vl": seeing(
            "qwen2_5_vl",
            "Qwen2_5_VL",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        ),
        "qwen 3 vl": seeing(
            "qwen3_vl",
            "Qwen3VL",
            {
                "head_dim": 16,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
            },
        ),
        "gemma 3, seeing": seeing(
            "gemma3", "Gemma3", {"head_dim": 32, **MIXED}, mm_tokens_per_image=4, boi_token_index=6, eoi_token_index=7
        ),
        "llava": seeing("llava", "Llava", {"model_type": "llama"}, image_seq_length=4),
        "mistral 3": seeing("mistral3", "Mistral3", {"model_type": "mistral", "sliding_window": 5, "head_dim": 16}),
        "pixtral": seeing(
            "pixtral",
            "Llava",
            {"model_type": "mistral", "head_dim": 16, "sliding_window": 5},
            vision_config={**VISION, "model_type": "pixtral"},
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            image_seq_length=4,
        ),
    }
)


# Older versions have attention classes by backend, masks that the layer cuts, losses inside the forward.
SINCE = {
    "qwen2 moe": "5.0", "olmoe": "5.0", "stablelm": "5.0", "stablelm 2 12b": "5.0", "gemma 2": "4.57",
    "gemma 3": "4.57", "cohere 2": "4.57", "gemma 3, seeing": "5.16", "granite moe": "4.57", "nemotron": "5.16",
    "phi 3.5 moe": "5.0", "qwen 2.5 vl": "5.10", "llava": "4.57", "mistral 3": "4.57",
    "pixtral": "4.57",
}  # fmt: skip
OLDEST = {
    "stablelm 2 12b": "5.0", "llama 4": "4.57", "qwen 2.5 vl": "5.0", "qwen 3 vl": "5.0", "gemma 3, seeing": "4.57",
    "pixtral": "4.57", "phi 3.5 moe": "5.0",
}  # fmt: skip
for _name in (*SINCE, *OLDEST):
    CASES[_name] = replace(CASES[_name], since=SINCE.get(_name, "4.51"), oldest=OLDEST.get(_name, "4.51"))


def available(name: str) -> bool:
    """Whether the installed transformers has the family."""
    import transformers

    case = CASES[name]
    return all(hasattr(transformers, part) for part in case.classes) and _reached(case.oldest)


def mixture(name: str) -> bool:
    """Whether the model is a mixture of experts."""
    return any("experts" in key for key in CASES[name].config)


def complete(name: str) -> bool:
    """Whether the row serves all roles in the installed transformers; else some sites are refused, with the reason."""
    return _reached(CASES[name].since)


def fused(name: str, model: Any) -> Any:
    """A patched copy; every site patched where the row describes this version of transformers."""
    if complete(name):
        return patched(model)
    twin = copy.deepcopy(model)
    report = fastplug.apply(twin).report
    assert report.patched
    assert all(decision.reason for decision in report.refused)
    return twin


def _reached(version: str) -> bool:
    import transformers

    here, there = (tuple(int(part) for part in text.split(".")[:2]) for text in (transformers.__version__, version))
    return here >= there


def build(name: str, seed: int = 1, **config: Any) -> Any:
    """A two-layer model of width 64 in fp32, in training mode."""
    import transformers

    case = CASES[name]
    values = {
        "vocab_size": models.VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    if case.text is not None:
        own = {"vision_config": VISION, "tie_word_embeddings": values["tie_word_embeddings"], **case.config, **config}
        values = {"text_config": {**values, **case.text}, **own}
    else:
        values.update(case.config, **config)
    config_class, model_class = case.classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = getattr(transformers, config_class)(**values)
        made._attn_implementation = case.attention
        model = getattr(transformers, model_class)(made)
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
            else:
                norm = "norm" in parameter_name and "gemma" not in case.row  # Gemma stores the distance from one
                nn.init.normal_(parameter, mean=float(norm), std=0.3)
    model.generation_config.pad_token_id = 0
    return model.train()


def linears(model: nn.Module) -> tuple[str, ...]:
    """Names of the linear layers in the decoder layers, routers left out."""
    found = [name for name, child in model.named_modules() if isinstance(child, nn.Linear)]
    inside = [name for name in found if re.search(r"\.(layers|h)\.\d", name) and "vision" not in name]
    names = {name.rpartition(".")[2] for name in inside}
    names = names or {"c_attn", "c_fc"}  # GPT-2's are no linear layers
    return tuple(sorted(names - {"gate", "router", "shared_expert_gate", "per_layer_input_gate"}))


def adapted(name: str, **config: Any) -> Any:
    """With LoRA on all linear layers of the decoder layers."""
    model = build(name, **config)
    return models.lora(model, target_modules=list(linears(model)))


def quantized(name: str, **config: Any) -> Any:
    """With LoRA over 4-bit weights."""
    model = build(name, **config)
    names = linears(model)
    return models.lora(models.quantized(model, names=names), target_modules=list(names))
