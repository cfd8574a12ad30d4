"""EXAONE 4: norms on the outputs of attention and MLP, q and k normalized by head, full attention without RoPE."""

from typing import Any

from torch import nn

from fastplug.families.row import Family, QKNormRow, RopeRow


def window(attention: nn.Module) -> int | None:
    return attention.sliding_window if attention.is_sliding else None  # type: ignore[return-value]


def rotates(attention: nn.Module) -> bool:
    """Where some layers have a window, the others have no RoPE."""
    layer: Any = attention
    return layer.sliding_window is None or layer.is_sliding


EXAONE4 = Family(
    "exaone4",
    "transformers.models.exaone4.modeling_exaone4",
    "Exaone4",
    qk_norm=QKNormRow(),
    rope=RopeRow(when=rotates),
    attention_arguments={"sliding_window": window},
    input_norm=None,
    attention_post_norm="post_attention_layernorm",
    post_norm=None,
    mlp_post_norm="post_feedforward_layernorm",
)
FAMILIES = (EXAONE4,)
