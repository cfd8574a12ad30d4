"""Every causal LM of the installed transformers that builds at a tiny size, with and without fastplug.

``python -m tests.families.sweep [MODEL_TYPE ...]`` prints the table: what was patched, by which row or by structure,
and how far loss and gradients are from the unpatched model's.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import fastplug
from fastplug.families.structural import NAME
from fastplug.patching.report import PATCHED
from tests import models
from tests.engine.step import Step, relative, step

SIZES: dict[str, Any] = {
    "vocab_size": models.VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "d_model": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "num_layers": 2,
    "d_ff": 128, "ffn_dim": 128, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16, "decoder_layers": 2,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 128, "encoder_layers": 2, "encoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "is_decoder": True, "tie_word_embeddings": False, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "shared_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": 32,
    "kv_lora_rank": 32, "num_key_value_heads": 4,
}  # fmt: skip
# Of models that mix kinds of layers, two layers are one of each.
MIXED: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_expand": 2,
        "mamba_chunk_size": 16,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
}  # fmt: skip
LARGEST = 30_000_000


@dataclass
class Row:
    """What the sweep found for one model type."""

    model_type: str
    loss: float = 0.0
    gradient: float = 0.0
    sites: Counter[tuple[str, str]] = field(default_factory=Counter)  # (role, row) of patched and checked sites
    reasons: set[str] = field(default_factory=set)

    def by_structure(self, *roles: str) -> bool:
        return all((role, NAME) in self.sites for role in roles)

    def __str__(self) -> str:
        sites = ", ".join(f"{count} x {role} ({row})" for (role, row), count in sorted(self.sites.items()))
        return f"{self.model_type:24s} loss {self.loss:.0e} gradients {self.gradient:.0e}  {sites or 'nothing'}"


def model_types() -> dict[str, str]:
    """Model type -> class of the causal LM."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(model_type: str) -> Any:
    """A tiny random model of a type, in training mode.

    Raises:
        Exception: Whatever its config or its constructor has against these sizes.
    """
    import transformers

    kind = getattr(transformers, model_types()[model_type])
    config_class = kind.config_class
    known = set(config_class().to_dict())
    values = {key: value for key, value in SIZES.items() if key in known}
    if "kv_lora_rank" in known:
        values.update({key: value for key, value in LATENT.items() if key in known})
    values.update(MIXED.get(model_type, {}))
    config = config_class(**values)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1)
    return model.train()


def measure(model_type: str, model: Any) -> Row:
    """Patch a copy of the model and compare one training step."""
    row = Row(model_type)
    twin = copy.deepcopy(model)
    for decision in fastplug.apply(twin).report.decisions:
        # Norms have nothing to gain without a GPU, yet they were found and checked.
        if decision.status == PATCHED or (decision.role == "norm" and "PyTorch's own" in (decision.reason or "")):
            row.sites[decision.role, decision.family] += 1
        elif decision.reason:
            row.reasons.add(f"{decision.role}: {decision.reason}")
    batch = models.batch()
    ours, theirs = step(twin, batch), step(model, batch)
    row.loss = relative(ours.loss, theirs.loss)
    row.gradient = distance(ours, theirs)
    return row


def distance(ours: Step, theirs: Step) -> float:
    """The largest difference of a gradient, relative to its largest value, or to a thousandth of the largest of all.

    Some gradients are zero but for rounding: that of a key's bias, those behind a router.
    """
    largest = max(float(g.abs().max()) for g in theirs.gradients.values() if g is not None and g.numel())
    worst = 0.0
    for name, theirs_gradient in theirs.gradients.items():
        mine, other = ours.gradients[name], theirs_gradient
        if mine is None and other is None:
            continue
        mine = torch.zeros_like(other) if mine is None and other is not None else mine
        other = torch.zeros_like(mine) if other is None and mine is not None else other
        assert mine is not None
        assert other is not None
        scale = max(float(other.abs().max()), 1e-3 * largest)
        worst = max(worst, float((mine - other).abs().max()) / scale)
    return worst


def main() -> None:
    warnings.simplefilter("ignore")
    for model_type in sys.argv[1:] or model_types():
        try:
            model = tiny(model_type)
            step(model, models.batch())
        except Exception as error:
            print(f"{model_type:24s} does not run at this size: {type(error).__name__}: {str(error)[:70]}")
            continue
        row = measure(model_type, model)
        print(row, flush=True)
        for reason in sorted(row.reasons):
            print(f"{'':24s}   left: {reason[:150]}")


if __name__ == "__main__":
    main()
