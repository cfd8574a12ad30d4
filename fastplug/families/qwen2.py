"""Qwen2 and 2.5 (a bias on q, k and v), Qwen3 (RMSNorm on every query and key head): windows by layer."""

from typing import Any

from torch import nn

from fastplug.families.row import Family, QKNormRow


def window(attention: nn.Module) -> int | None:
    """The layer's own attribute; transformers 4.51's Qwen2 works it out from the config at every call instead."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[return-value]
    config: Any = attention.config
    used = config.use_sliding_window and attention.layer_idx >= config.max_window_layers
    return config.sliding_window if used else None


QWEN2 = Family(
    "qwen2",
    "transformers.models.qwen2.modeling_qwen2",
    "Qwen2",
    attention_arguments={"sliding_window": window},
)
QWEN3 = Family(
    "qwen3",
    "transformers.models.qwen3.modeling_qwen3",
    "Qwen3",
    attention_arguments={"sliding_window": window},
    qk_norm=QKNormRow(),
)
FAMILIES = (QWEN2, QWEN3)
