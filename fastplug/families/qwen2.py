"""Qwen2 and 2.5 (a bias on q, k and v), Qwen3 (RMSNorm on every query and key head): windows by layer."""

from torch import nn

from fastplug.families.row import Family


def window(attention: nn.Module) -> int | None:
    """The layer's own attribute; transformers 4.51's Qwen2 works it out from the config at every call instead."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[return-value]
    config = attention.config
    used = getattr(config, "use_sliding_window", False) and attention.layer_idx >= config.max_window_layers
    return config.sliding_window if used else None  # type: ignore[return-value]


QWEN2 = Family("qwen2", "transformers.models.qwen2.modeling_qwen2", "Qwen2", sliding_window=window)
QWEN3 = Family(
    "qwen3", "transformers.models.qwen3.modeling_qwen3", "Qwen3", sliding_window=window, qk_norm=("q_norm", "k_norm")
)
