"""A family of models as one row of data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class NormRow:
    """How a family's RMSNorm computes.

    Attributes:
        offset: Added to the weight (Gemma: 1).
        cast_first: True casts to the input's dtype before the weight is applied (Llama), False after (Gemma).
        eps: The attribute that holds epsilon.
    """

    offset: float = 0.0
    cast_first: bool = True
    eps: str = "variance_epsilon"


def no_window(attention: nn.Module) -> int | None:
    """Full attention in every layer."""
    return None


@dataclass(frozen=True)
class Family:
    """One row: which classes of which transformers module play which role, and how they differ from Llama.

    Attributes:
        name: The family's name in reports.
        module: The Python module that defines the classes, e.g. ``transformers.models.llama.modeling_llama``.
        prefix: The common prefix of the class names: ``Llama`` for ``LlamaDecoderLayer`` and so on.
        norm: The cast order, offset and epsilon of its RMSNorm.
        qkv: Names of the query, key and value projections of the attention module.
        out: Name of the attention module's output projection.
        qk_norm: Names of the norms on the query and key heads before RoPE, or None.
        sliding_window: The window the attention module hands to the attention function, by module.
        gate, up, down, activation: Names in the gated MLP.
        attention_name, mlp_name, input_norm, post_norm: Names in the decoder layer.
        head: Name of the output projection of the causal LM.
        logit_softcap, logit_scale: Given the config, the final softcap (or None) and the factor on the logits.
    """

    name: str
    module: str
    prefix: str
    norm: NormRow = field(default_factory=NormRow)
    qkv: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    qk_norm: tuple[str, str] | None = None
    sliding_window: Callable[[nn.Module], int | None] = no_window
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    attention_name: str = "self_attn"
    mlp_name: str = "mlp"
    input_norm: str = "input_layernorm"
    post_norm: str = "post_attention_layernorm"
    head: str = "lm_head"
    logit_softcap: Callable[[Any], float | None] = lambda config: None
    logit_scale: Callable[[Any], float] = lambda config: 1.0

    @property
    def classes(self) -> dict[str, str]:
        """Class name -> role."""
        return {
            f"{self.prefix}DecoderLayer": "decoder_layer",
            f"{self.prefix}Attention": "attention",
            f"{self.prefix}MLP": "mlp",
            f"{self.prefix}RMSNorm": "norm",
            f"{self.prefix}ForCausalLM": "lm_head_loss",
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> Family:
        return self
