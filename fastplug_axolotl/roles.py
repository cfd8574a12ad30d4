"""Who does what: Axolotl's own kernels and plugins, and the roles that fastplug leaves to them."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from fastplug.options import Role

# Axolotl turns these on by itself in LoRA runs when none of them is set.
LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")

# A key of Axolotl's config (its own, Liger's, CutCrossEntropy's; some only of old releases) -> the role that whoever
# set it wants done that way.
OWNERS: dict[str, Role] = {
    "lora_qkv_kernel": "attention",
    "lora_o_kernel": "attention",
    "fused_attn_kernel": "attention",
    "liger_rope": "attention",
    "unsloth_lora_qkv": "attention",
    "unsloth_lora_o": "attention",
    "unsloth_rope": "attention",
    "lora_mlp_kernel": "mlp",
    "tiled_mlp": "mlp",
    "flash_attn_fuse_mlp": "mlp",
    "liger_glu_activation": "mlp",
    "liger_swiglu": "mlp",
    "unsloth_lora_mlp": "mlp",
    "liger_rms_norm": "norm",
    "flash_attn_rms_norm": "norm",
    "unsloth_rms_norm": "norm",
    "chunked_cross_entropy": "lm_head_loss",
    "flash_attn_cross_entropy": "lm_head_loss",
    "liger_cross_entropy": "lm_head_loss",
    "liger_fused_linear_cross_entropy": "lm_head_loss",
    "cut_cross_entropy": "lm_head_loss",
    "unsloth_cross_entropy_loss": "lm_head_loss",
}


def turn_off_unset_kernels(cfg: MutableMapping[str, Any]) -> list[str]:
    """Set Axolotl's LoRA kernels that the user did not mention to False; returns their names."""
    if cfg.get("adapter") not in ("lora", "qlora"):
        return []
    unset = [name for name in LORA_KERNELS if cfg.get(name) is None]
    for name in unset:
        cfg[name] = False
    return unset


def taken(cfg: Mapping[str, Any]) -> dict[Role, list[str]]:
    """Role -> the keys of a validated config by which the user gave it to somebody else."""
    roles: dict[Role, list[str]] = {}
    for key, role in OWNERS.items():
        if cfg.get(key):
            roles.setdefault(role, []).append(key)
    return roles


def left_alone(roles: Mapping[Role, list[str]]) -> list[Role]:
    """The roles that fastplug must leave alone. The fused decoder layer contains attention, MLP and norms."""
    inner = {"attention", "mlp", "norm"} & set(roles)
    return sorted({*roles, "decoder_layer"} if inner else roles)
