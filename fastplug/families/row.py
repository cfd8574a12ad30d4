"""A family of models as one row of data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from fastplug.sharding import own_class

Names = str | tuple[str, ...] | None


@dataclass(frozen=True)
class NormRow:
    """How a family's norm computes.

    Attributes:
        kind: ``"rms"`` for RMSNorm, ``"layer"`` for LayerNorm (mean-centred, computed by PyTorch's own kernel).
        offset: Added to the weight (Gemma: 1).
        cast_first: True casts to the input's dtype before the weight is applied (Llama), False after (Gemma).
        eps: The attribute that holds epsilon.
    """

    kind: Literal["rms", "layer"] = "rms"
    offset: float = 0.0
    cast_first: bool = True
    eps: str = "variance_epsilon"


@dataclass(frozen=True)
class RopeRow:
    """How a family turns queries and keys by position.

    Attributes:
        layout: Which channels form pair j of R rotated ones: ``"half"`` (j, j + R/2) or ``"interleaved"``
            (2j, 2j + 1).
        table: What the given cos and sin [B or 1, S, ...] hold: ``"half"`` each angle at j and j + R/2, ``"repeated"``
            at 2j and 2j + 1 (Cohere), ``"narrow"`` once (gpt-oss).
        when: An attribute of the attention module that is false, zero or None in layers without RoPE, a function of the
            module, or None.

    How many channels turn (partial rotary) follows from the width of cos, how far (linear, dynamic, yarn, llama3 and
    longrope scaling, and by layer type) from its values: the model computes both.
    """

    layout: Literal["half", "interleaved"] = "half"
    table: Literal["half", "repeated", "narrow"] = "half"
    when: str | Callable[[nn.Module], bool] | None = None

    def turns(self, attention: nn.Module) -> bool:
        """Whether the layer of an attention module has RoPE."""
        if self.when is None:
            return True
        return bool(getattr(attention, self.when) if isinstance(self.when, str) else self.when(attention))

    def tables(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B or 1, S, R] with each angle at j and j + R/2, as the op reads them."""
        if self.table == "repeated":
            cos, sin = cos[..., ::2], sin[..., ::2]
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


@dataclass(frozen=True)
class QKNormRow:
    """Norms on queries and keys.

    Attributes:
        names: The two modules in the attention module. Where they are absent, as some configurations have it, q and k
            are not normalized.
        shape: What the modules read: ``"heads"`` [B, S, heads, head_dim], ``"heads_first"`` [B, heads, S, head_dim], or
            ``"flat"`` [B, S, heads * head_dim].
        after_rope: Whether they come after the rotation.
    """

    names: tuple[str, str] = ("q_norm", "k_norm")
    shape: Literal["heads", "heads_first", "flat"] = "heads"
    after_rope: bool = False


@dataclass(frozen=True)
class Family:
    """One row: which classes of which transformers module play which role, and how they differ from Llama.

    Attributes:
        name: The family's name in reports.
        module: The Python module that defines the classes, e.g. ``transformers.models.llama.modeling_llama``.
        prefix: The common prefix of the class names: ``Llama`` for ``LlamaDecoderLayer`` and so on.
        class_names: Role -> class name or names, where they are not prefix + ``DecoderLayer``, ``Attention``, ``MLP``,
            ``RMSNorm``, ``ForCausalLM``; None where no class plays the role.
        norm: The kind, cast order, offset and epsilon of its norms.
        qkv: Names of the query, key and value projections of the attention module, or of the one that makes all three.
        qkv_layout: How a joint projection lays them out: ``"blocks"`` all of q, then k, then v; ``"heads"`` q, k and v
            of the first head, then of the second (GPT-NeoX).
        out: Name of the attention module's output projection.
        head_dim: The attribute of the attention module that holds the width of a head.
        qk_norm: The norms on queries and keys, or None.
        rope: The layout of the rotation.
        attention_arguments: What the attention module hands to the attention function beside mask, scaling and dropout:
            keyword -> attribute of the module, or a function of it. Windows, softcaps and sinks are given so.
        query_scale: Given the attention module and its arguments, a factor [B or 1, 1, S, 1] on the rotated queries, in
            families that scale them by position; None elsewhere.
        output_dropout: The attribute of attention and MLP with the probability of a dropout after their last
            projection, or None.
        gate, up, down, activation: Names in the gated MLP. ``up=None`` where ``gate`` makes both, gate first;
            ``gate=None`` where the MLP is not gated.
        attention_name, mlp_name, old_mlp_name: Names in the decoder layer, the last in older transformers versions.
        input_norm, attention_post_norm, post_norm, mlp_post_norm: The norms of a layer, each None where there is none:
            before attention, on attention's output, before the MLP, on the MLP's output.
        dropouts: Names of the dropout modules in the layer after attention and after the MLP.
        parallel: Whether attention and MLP read the same residual stream: True, False, or the attribute of the layer
            that says so. Without a ``post_norm`` the MLP then shares attention's normalized input.
        residual_multiplier: The attribute of the layer with the factor on what both parts add to the stream, or None.
        rope_of_layer: Where the layer is given a rotation for each kind of layer: (keyword if the attribute is true,
            keyword if it is false, attribute of the attention module).
        shared: For the role ``linear``, a module whose forward runs as it is: names of its projections, in groups that
            read one tensor each.
        mixture: Whether some layers have a mixture of experts for an MLP; it runs as it is.
        layer_parameters: Parameters of the layer's forward with which transformers versions mark a layer that does
            more than this row says (it cuts the mask for its window, say): there the layer runs as it is, its parts
            are patched.
        head: Name of the output projection of the causal LM; absent, what ``get_output_embeddings`` returns.
        logit_softcap, logit_scale: Given the config, the final softcap (or None) and the factor on the logits.
        trace_loss: Whether head and loss are read off the model's own forward as it runs, for forwards that do more
            than backbone, head and loss (image inputs, router losses).
    """

    name: str
    module: str
    prefix: str
    class_names: Mapping[str, Names] = field(default_factory=dict)
    norm: NormRow = field(default_factory=NormRow)
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    qkv_layout: Literal["blocks", "heads"] = "blocks"
    out: str = "o_proj"
    head_dim: str = "head_dim"
    qk_norm: QKNormRow | None = None
    rope: RopeRow = field(default_factory=RopeRow)
    attention_arguments: Mapping[str, str | Callable[[nn.Module], Any]] = field(default_factory=dict)
    query_scale: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor] | None = None
    output_dropout: str | None = None
    gate: str | None = "gate_proj"
    up: str | None = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    attention_name: str = "self_attn"
    mlp_name: str = "mlp"
    old_mlp_name: str | None = None
    input_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    post_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    dropouts: tuple[str | None, str | None] = (None, None)
    parallel: bool | str = False
    residual_multiplier: str | None = None
    rope_of_layer: tuple[str, str, str] | None = None
    shared: tuple[tuple[str, ...], ...] = ()
    mixture: bool = False
    layer_parameters: tuple[str, ...] = ("last_cache_position",)
    head: str = "lm_head"
    logit_softcap: Callable[[Any], float | None] = lambda config: None
    logit_scale: Callable[[Any], float] = lambda config: 1.0
    trace_loss: bool = False

    @functools.cached_property
    def classes(self) -> dict[str, str]:
        """Class name -> role."""
        default = {
            "decoder_layer": f"{self.prefix}DecoderLayer",
            "attention": f"{self.prefix}Attention",
            "mlp": f"{self.prefix}MLP",
            "norm": f"{self.prefix}RMSNorm",
            "lm_head_loss": f"{self.prefix}ForCausalLM",
        }
        found: dict[str, str] = {}
        for role, names in {**default, **self.class_names}.items():
            for name in (names,) if isinstance(names, str) else names or ():
                found[name] = role
        return found

    def plays(self, module: nn.Module, role: str) -> bool:
        """Whether the module's class is the one that plays ``role`` in this family."""
        kind = own_class(type(module))
        return kind.__module__ == self.module and self.classes.get(kind.__qualname__) == role

    def mlp_of(self, layer: nn.Module) -> str:
        """The name of the MLP in a decoder layer of the installed transformers."""
        old = self.old_mlp_name
        return old if old is not None and not hasattr(layer, self.mlp_name) else self.mlp_name

    @functools.cached_property
    def gate_up(self) -> tuple[str, ...]:
        """Names of the projections that the MLP's input goes into."""
        return tuple(name for name in (self.gate, self.up) if name is not None)

    @functools.cached_property
    def llama_layer(self) -> bool:
        """Whether a layer is norm, attention, add, norm, gated MLP, add, and nothing else."""
        return (
            self.norm.kind == "rms"
            and self.input_norm is not None
            and self.post_norm is not None
            and self.gate is not None
            and not (self.attention_post_norm or self.mlp_post_norm or any(self.dropouts) or self.output_dropout)
            and not (self.parallel or self.residual_multiplier or self.mixture or self.rope_of_layer)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Family:
        return self
