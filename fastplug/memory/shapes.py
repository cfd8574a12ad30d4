"""The shapes of a model that its memory and time follow from: read off its modules, with or without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from fastplug.patching.sites import Site


@dataclass(frozen=True)
class LinearShape:
    """One linear layer of a decoder layer, with its adapter.

    Attributes:
        out_features, in_features: The shape of its weight.
        bytes: What the weight takes as it is stored, scales and bias included.
        decoded: Whether it is decoded into a buffer for each product.
        itemsize: Bytes of an element of a weight that is stored densely, of the compute dtype else.
        trained: Bytes of its own parameters that get a gradient.
        rank: Of its adapter; 0 without one.
        adapter_itemsize: Bytes of an element of A and B.
        drops: Whether its adapter drops its input.
        magnitudes: Whether its adapter has magnitudes (DoRA).
    """

    out_features: int
    in_features: int
    bytes: int
    decoded: bool = False
    itemsize: int = 2
    trained: int = 0
    rank: int = 0
    adapter_itemsize: int = 4
    drops: bool = False
    magnitudes: bool = False

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.out_features * self.in_features

    @property
    def adapter_bytes(self) -> int:
        """Bytes of A and B."""
        return self.rank * (self.in_features + self.out_features) * self.adapter_itemsize


Linears = tuple[LinearShape, ...]


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer. Equal shapes cost the same.

    Attributes:
        hidden: Width of the residual stream.
        heads, kv_heads, head_dim: Of its attention.
        qkv, out, gate_up, down: The linear layers that the fused ops run, by the tensor that they read. ``gate_up`` is
            the one matrix in of an MLP without a gate.
        others: Linear layers beside these: experts, routers, what no row names.
        fused: Whether the decoder layer as a whole is one that fastplug runs, so that its policy can be chosen.
        gated: Whether the MLP is a gated one that the fused op runs.
        input_norm, post_norm: How the norms before attention and MLP are run: ``"fused"`` into the op that follows,
            ``"apart"``, ``"shared"`` (the MLP reads what attention reads) or ``""``.
        attention_post_norm, mlp_post_norm: Whether there are norms on the outputs of attention and MLP.
        head_norm: How q and k are normalized: ``"fused"``, ``"apart"`` or ``""``.
        layer_norm: Whether the norms centre their input.
        parallel: Whether attention and MLP read the same residual stream.
        table_copies: Whether each layer makes copies of cos and sin.
        window: Positions that attention reaches back, or None.
        softcap: Whether attention's scores have a soft cap.
        scaled: Whether queries are multiplied after they were turned.
        dropouts: How many dropouts of the residual stream's width drop something.
        activation: Tensors of the MLP's inner width that a layer keeps which the host runs.
        active: Share of the weights in ``others`` that one token goes through.
        extra_weights: Bytes of everything else in the layer: norms, sinks.
        extra_trained: Bytes of these that get a gradient.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv: Linears = ()
    out: Linears = ()
    gate_up: Linears = ()
    down: Linears = ()
    others: Linears = ()
    fused: bool = True
    gated: bool = True
    input_norm: str = "fused"
    post_norm: str = "fused"
    attention_post_norm: bool = False
    mlp_post_norm: bool = False
    head_norm: str = ""
    layer_norm: bool = False
    parallel: bool = False
    table_copies: bool = False
    window: int | None = None
    softcap: bool = False
    scaled: bool = False
    dropouts: int = 0
    activation: int = 4
    active: float = 1.0
    extra_weights: int = 0
    extra_trained: int = 0

    @property
    def linears(self) -> Linears:
        """All linear layers."""
        return self.qkv + self.out + self.gate_up + self.down + self.others

    @property
    def intermediate(self) -> int:
        """Width of gate (and of up)."""
        return self.down[0].in_features if self.down else 0

    @property
    def queries(self) -> int:
        """Channels of the queries."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Channels of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def bytes(self) -> int:
        """What its weights take, adapters left out."""
        return sum(linear.bytes for linear in self.linears) + self.extra_weights

    @property
    def keepable(self) -> Linears:
        """Those whose decoded weight can stay from step to step under a plan."""
        groups = (self.qkv, self.out, self.gate_up, self.down) if self.fused else ()
        kinds = [group for group in groups if not any(linear.magnitudes for linear in group)]
        return tuple(linear for group in kinds for linear in group if linear.decoded)

    @property
    def adapter_bytes(self) -> int:
        """What its adapters take."""
        return sum(linear.adapter_bytes for linear in self.linears)

    @property
    def gradient_bytes(self) -> int:
        """What the gradients of its parameters take."""
        return self.adapter_bytes + sum(linear.trained for linear in self.linears) + self.extra_trained


@dataclass(frozen=True)
class ModelShape:
    """A causal language model.

    Attributes:
        layers: The decoder layers, in the order of the forward.
        hidden: Width of the residual stream.
        vocabulary: Rows of the head.
        head_itemsize: Bytes of an element of the head's weight.
        head_trained: Bytes of the head's parameters that get a gradient.
        tied: Whether the head is the embedding.
        other_bytes: Weights outside the layers: embedding, head, final norm, towers for images.
        other_trained: Bytes of these that get a gradient, and adapters on them.
        trained: (elements, bytes of one) of all that gets a gradient, in total.
        stream_itemsize: Bytes of an element of the residual stream.
        compute_itemsize: Bytes of an element in the products.
        attention: The implementation that the model's config names.
        name: For the reader.
        positions: The longest sequence that the config was made for; 0 where it does not say.
        rope: How the rotary embedding is scaled to reach it, or empty.
    """

    layers: tuple[LayerShape, ...]
    hidden: int
    vocabulary: int
    head_itemsize: int = 2
    head_trained: int = 0
    tied: bool = False
    other_bytes: int = 0
    other_trained: int = 0
    trained: tuple[tuple[int, int], ...] = ()
    stream_itemsize: int = 2
    compute_itemsize: int = 2
    attention: str = "sdpa"
    name: str = ""
    notes: tuple[str, ...] = field(default=(), compare=False)
    positions: int = field(default=0, compare=False)
    rope: str = field(default="", compare=False)

    @property
    def weight_bytes(self) -> int:
        """All weights, adapters left out."""
        return self.other_bytes + sum(layer.bytes for layer in self.layers)

    @property
    def adapter_bytes(self) -> int:
        """All adapters of the layers."""
        return sum(layer.adapter_bytes for layer in self.layers)

    @classmethod
    def of_model(
        cls,
        model: nn.Module,
        sites: Sequence[tuple[Site, bool]],
        *,
        quant: str | None = None,
        rank: int | None = None,
        residual_dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        attention: str | None = None,
        name: str = "",
    ) -> ModelShape:
        """Read a model, whose parameters may be on the meta device.

        Args:
            model: The model, or a PEFT model around it.
            sites: Its decoder layers, and whether fastplug runs each as a whole: see
                :func:`fastplug.memory.model_reading.decoder_layers`.
            quant: Count the linear layers, but the head, as stored in this format of ``formats.py``.
            rank: Count LoRA adapters of this rank on all linear layers but the head, in float32 as PEFT has them, over
                a model that is frozen otherwise; 0: none, so that the whole model is trained; None: as the model is.
            residual_dtype: Of the residual stream; None: that of the embedding.
            compute_dtype: Of the products; None: autocast's where it is on, else that of the weights.
            attention: The implementation of attention; None: the one that the config names.
            name: What to call it; empty: what the config does.

        Raises:
            ModelError: It has no decoder layers.
        """
        from fastplug.memory.model_reading import read_model

        return read_model(
            model,
            sites,
            quant=quant,
            rank=rank,
            residual_dtype=residual_dtype,
            compute_dtype=compute_dtype,
            attention=attention,
            name=name,
        )


__all__ = ["LayerShape", "LinearShape", "Linears", "ModelShape"]
