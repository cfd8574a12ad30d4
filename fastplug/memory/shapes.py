"""The shapes of a model that its memory and time follow from: read off its modules, with or without weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastplug.errors import ModelError
from fastplug.families import Family
from fastplug.memory.formats import encoded_bytes, stored_bytes
from fastplug.patching.inspection import unwrap_saved
from fastplug.patching.sites import Site
from fastplug.sharding import distributed, own_class


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
            sites: Its decoder layers, and whether fastplug runs each as a whole: see :func:`decoder_layers`.
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
        if not sites:
            raise ModelError(f"fastplug: {type(model).__name__} has no decoder layers that a plan could be made for")
        unwrap: Any = getattr(model, "get_base_model", None)
        base: Any = model if unwrap is None else unwrap()
        config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
        head = base.get_output_embeddings()
        embedding = base.get_input_embeddings().weight
        dtype = compute_dtype or _compute_dtype(sites[0][0].module)
        # Under autocast the products are in 16 bits, whatever the weights are in.
        compute = dtype.itemsize
        read = _Reader(quant, rank, compute)
        layers = tuple(read.layer(site, fused, config) for site, fused in sites)
        inside = {id(p) for site, _ in sites for p in site.module.parameters()}
        outside = [(name, p) for name, p in base.named_parameters() if id(p) not in inside]
        other = sum(_parameter_bytes(p) for _, p in outside)
        other += sum(_tensor_bytes(b) for _, b in base.named_buffers())
        if quant is not None:
            other -= read.saved_outside(base, inside, head)
        head_weight = unwrap_saved(head)
        head_weight = getattr(head_weight, "base_layer", head_weight)
        weight: Any = getattr(head_weight, "weight", embedding)
        stream = residual_dtype or embedding.dtype
        return cls(
            layers=layers,
            hidden=config.hidden_size,
            vocabulary=weight.shape[0],
            head_itemsize=weight.element_size(),
            head_trained=_parameter_bytes(weight) if weight.requires_grad and not rank else 0,
            tied=weight is embedding,
            other_bytes=other - sum(_parameter_bytes(p) for name, p in outside if "lora_" in name),
            other_trained=0 if rank else sum(_parameter_bytes(p) for _, p in outside if p.requires_grad),
            trained=_trained(base) if not rank else ((sum(layer.adapter_bytes for layer in layers) // 4, 4),),
            stream_itemsize=stream.itemsize,
            compute_itemsize=compute,
            attention=attention or str(getattr(config, "_attn_implementation", None) or "sdpa"),
            name=name or str(getattr(config, "_name_or_path", "") or type(base).__name__),
        )


def decoder_layers(model: nn.Module, options: Any = None, device: Any = "cuda") -> list[tuple[Site, bool]]:
    """The decoder layers of a model, and whether fastplug runs each as a whole. Nothing is changed.

    Args:
        model: Patched or not, with weights or on the meta device.
        options: :class:`fastplug.Options` under which it is or would be patched.
        device: Where it will run.
    """
    from fastplug.manager import manager
    from fastplug.ops.table import table_for
    from fastplug.options import Options
    from fastplug.patching.engine import decide
    from fastplug.patching.preview import UnloadedWeights
    from fastplug.patching.report import PATCHED
    from fastplug.patching.sites import Runtime

    options = Options.of(options)
    plugins = manager(options.plugins)
    codecs = [UnloadedWeights(codec) for codec in plugins.collect("fastplug_codecs")]
    # What is decided for a layer does not depend on the ops, so the references of the CPU stand in for kernels.
    runtime = Runtime(options, table_for(torch.device("cpu"), "reference", options.plugins), codecs)
    decided = decide(model, runtime, plugins)
    found = [(site, choice.status == PATCHED) for site, choice in decided if site.role == "decoder_layer"]
    return found or [(site, False) for site in _stack(model)]


def _stack(model: nn.Module) -> Iterator[Site]:
    """The members of the longest list of modules of one class: the decoder layers of a model that no row names."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    lists = [(name, m) for name, m in lists if len({type(child) for child in m}) == 1 and "vision" not in name]
    if not lists:
        return
    weights = [sum(p.numel() for p in m.parameters()) for _, m in lists]
    name, layers = lists[weights.index(max(weights))]
    unknown = Family("", "", "")
    for i, layer in enumerate(layers):
        yield Site("decoder_layer", f"{name}.{i}", layer, unknown)


class _Reader:
    """Reads layers; linear layers are counted as stored in ``quant`` and with adapters of ``rank``, where given."""

    def __init__(self, quant: str | None, rank: int | None, compute: int) -> None:
        self.quant, self.rank, self.compute = quant, rank, compute

    def layer(self, site: Site, fused: bool, config: Any) -> LayerShape:
        layer, family = site.module, site.family
        inner = list(linears(layer))
        groups: dict[str, Any] = {"qkv": (), "out": (), "gate_up": (), "down": ()}
        named: dict[str, Any] = {}
        gated = False
        if family.name:
            attention = getattr(layer, family.attention_name)
            named, groups = self._attention(layer, family, attention, config)
            mlp = getattr(layer, family.mlp_name, None) or getattr(layer, family.old_mlp_name or "", None)
            if mlp is not None and family.plays(mlp, "mlp"):
                gated = family.gate is not None
                groups["gate_up"] = tuple(self.linear(getattr(mlp, name)) for name in family.gate_up)
                groups["down"] = (self.linear(getattr(mlp, family.down)),)
            taken = {id(getattr(attention, name)) for name in (*family.qkv, family.out)}
            if groups["down"]:
                taken |= {id(getattr(mlp, name)) for name in (*family.gate_up, family.down)}
        else:
            named, taken = _unnamed(config), set()
        rest = [module for module in inner if id(module) not in taken]
        experts, active = _experts(layer, config, self)
        others = tuple(self.linear(module) for module in rest) + experts
        if named.get("post_norm") == "fused" and not gated:
            named["post_norm"] = "apart"
        inside = {id(p) for module in inner for p in module.parameters()}
        inside |= {id(p) for p in layer.parameters() if p.dim() == 3}  # stacked experts
        extra = [p for p in layer.parameters() if id(p) not in inside]
        return LayerShape(
            **named,
            **groups,
            others=others,
            fused=fused,
            gated=gated,
            dropouts=_dropouts(layer, family),
            activation=_activation(layer),
            active=active,
            extra_weights=sum(_parameter_bytes(p) for p in extra),
            extra_trained=0 if self.rank else sum(_parameter_bytes(p) for p in extra if p.requires_grad),
        )

    def _attention(self, layer: nn.Module, family: Family, attention: Any, config: Any) -> tuple[dict[str, Any], Any]:
        qkv = tuple(self.linear(getattr(attention, name)) for name in family.qkv)
        out = self.linear(getattr(attention, family.out))
        head_dim = int(getattr(attention, family.head_dim, 0) or _head_dim(config))
        queries = out.in_features
        total = sum(linear.out_features for linear in qkv)
        keys = qkv[1].out_features if len(qkv) == 3 else (total - queries) // 2
        parallel = bool(getattr(layer, family.parallel)) if isinstance(family.parallel, str) else family.parallel
        norm = {name: getattr(layer, name, None) for name in _norm_names(family) if name is not None}
        shares = parallel and (family.post_norm is None or norm.get(family.post_norm) is None)
        apart = family.norm.kind != "rms"
        inner, post = (norm.get(name or "") for name in (family.input_norm, family.post_norm))
        head_norm = ""
        if family.qk_norm is not None and getattr(attention, family.qk_norm.names[0], None) is not None:
            rotates = family.rope.turns(attention)
            fits = rotates and not apart and family.qk_norm.shape == "heads" and not family.qk_norm.after_rope
            head_norm = "fused" if fits else "apart"
        named = {
            "hidden": out.out_features,
            "heads": max(1, queries // head_dim),
            "kv_heads": max(1, keys // head_dim),
            "head_dim": head_dim,
            "input_norm": "" if inner is None else "apart" if apart or shares else "fused",
            "post_norm": "shared" if shares else "" if post is None else "apart" if apart or parallel else "fused",
            "attention_post_norm": norm.get(family.attention_post_norm or "") is not None,
            "mlp_post_norm": norm.get(family.mlp_post_norm or "") is not None,
            "head_norm": head_norm,
            "layer_norm": apart,
            "parallel": parallel,
            "table_copies": family.rope.table != "half",
            "window": _window(family, attention),
            "softcap": "softcap" in family.attention_arguments,
            "scaled": getattr(family, "query_scale", None) is not None,
        }
        return named, {"qkv": qkv, "out": (out,), "gate_up": (), "down": ()}

    def linear(self, module: nn.Module) -> LinearShape:
        inner: Any = unwrap_saved(module)
        inner = module if isinstance(inner, str) else inner
        base: Any = getattr(inner, "base_layer", getattr(inner, "base", inner))
        out_features, in_features = linear_shape(base)
        weight: Any = getattr(base, "weight", None)
        dense = type(base) is nn.Linear or own_class(type(base)).__name__ in ("Conv1D", "FalconLinear", "Linear")
        trained = sum(_parameter_bytes(p) for p in base.parameters(recurse=False) if p.requires_grad)
        if self.quant is not None:
            bias = 0 if getattr(base, "bias", None) is None else _tensor_bytes(base.bias)
            size, decoded = encoded_bytes(self.quant, out_features, in_features) + bias, True
        else:
            plain = type(weight) in (nn.Parameter, torch.Tensor) or (weight is not None and distributed(weight))
            decoded = not (dense and plain and weight.is_floating_point() and weight.element_size() >= 2)
            size = stored_bytes(base)
        rank, itemsize, drops = _adapter(inner) if self.rank is None else (self.rank, 4, False)
        if self.rank:
            trained = 0
        return LinearShape(
            out_features,
            in_features,
            size,
            decoded,
            self.compute if decoded else weight.element_size(),
            trained,
            rank,
            itemsize,
            drops,
        )

    def saved_outside(self, base: Any, inside: set[int], head: Any) -> int:
        """Bytes that the format saves on linear layers outside the decoder layers, the head left out."""
        assert self.quant is not None
        saved = 0
        for module in base.modules():
            if type(module) is nn.Linear and module is not head and id(module.weight) not in inside:
                shape = linear_shape(module)
                saved += _tensor_bytes(module.weight) - encoded_bytes(self.quant, *shape)
        return saved


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one matrix product, with an adapter or without, whatever its weight is stored in."""
    if hasattr(module, "base_layer"):
        return hasattr(module, "lora_A") and is_linear(module.base_layer)  # type: ignore[arg-type]
    name = own_class(type(module)).__name__
    has_weight = hasattr(module, "weight") or hasattr(module, "out_features")
    return (isinstance(module, nn.Linear) or "Linear" in name or name == "Conv1D") and has_weight


def linears(module: nn.Module) -> Iterator[nn.Module]:
    """The linear modules inside, an adapted one once, without its parts."""
    for child in module.children():
        if is_linear(child):
            yield child
        else:
            yield from linears(child)


def linear_shape(module: Any) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer, transformers' Conv1D included."""
    if hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)
    inner, outer = module.weight.shape  # Conv1D stores its weight transposed
    return int(outer), int(inner)


def _adapter(module: Any) -> tuple[int, int, bool]:
    """(rank, bytes of an element, whether its input is dropped) of the active LoRA adapter."""
    if isinstance(getattr(module, "lora_A", None), nn.Parameter):  # fastplug.layers.LoRALinear
        return int(module.lora_A.shape[0]), module.lora_A.element_size(), module.dropout > 0
    names = [name for name in getattr(module, "active_adapters", ()) if name in getattr(module, "lora_A", ())]
    if not names or getattr(module, "merged", False):
        return 0, 4, False
    ranks = [module.lora_A[name].weight for name in names]
    drops = any(getattr(module.lora_dropout[name], "p", 0.0) > 0 for name in names)
    return sum(int(weight.shape[0]) for weight in ranks), ranks[0].element_size(), drops


def _compute_dtype(layer: nn.Module) -> torch.dtype:
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    for module in layer.modules():
        if not is_linear(module) or hasattr(module, "base_layer") or hasattr(module, "lora_A"):
            continue
        dtype: Any = getattr(module, "compute_dtype", None) or getattr(getattr(module, "weight", None), "dtype", None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2:
            return dtype
    return torch.bfloat16


def _norm_names(family: Family) -> tuple[str | None, ...]:
    return family.input_norm, family.attention_post_norm, family.post_norm, family.mlp_post_norm


def _window(family: Family, attention: Any) -> int | None:
    """How far attention reaches back."""
    source = family.attention_arguments.get("sliding_window")
    found = None
    if source is not None:
        found = getattr(attention, source, None) if isinstance(source, str) else source(attention)
    return int(found) if found else None


def _head_dim(config: Any) -> int:
    return int(_of_config(config, "head_dim") or config.hidden_size // config.num_attention_heads)


def _of_config(config: Any, name: str) -> Any:
    """A value of the config, or None: some raise where layers differ."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _unnamed(config: Any) -> dict[str, Any]:
    heads = config.num_attention_heads
    return {
        "hidden": config.hidden_size,
        "heads": heads,
        "kv_heads": _of_config(config, "num_key_value_heads") or heads,
        "head_dim": _head_dim(config),
        "input_norm": "apart",
        "post_norm": "apart",
        "layer_norm": "layer_norm_epsilon" in config.to_dict(),
    }


def _dropouts(layer: nn.Module, family: Family) -> int:
    """Dropouts on the outputs of attention and MLP that drop something."""
    parts = [getattr(layer, name, None) for name in family.dropouts if name is not None]
    count = sum(isinstance(part, nn.Dropout) and part.p > 0 for part in parts)
    if family.output_dropout is not None:
        parts = [getattr(layer, name, None) for name in (family.attention_name, family.mlp_name)]
        count += sum(float(getattr(part, family.output_dropout, 0) or 0) > 0 for part in parts)
    return count


def _activation(layer: nn.Module) -> int:
    """What PyTorch keeps of an MLP's inner width: the input of the activation, that of the last projection, and what
    lies between where the activation is a formula of several operations or multiplies a gate."""
    names = {own_class(type(module)).__name__ for module in layer.modules()}
    gated = any("gate" in name for name, module in layer.named_modules() if is_linear(module))
    return 4 if gated or "NewGELUActivation" in names else 2


def _experts(layer: nn.Module, config: Any, reader: _Reader) -> tuple[Linears, float]:
    """Experts that are stacked into one tensor, and the share of all experts that a token goes through."""
    stacked = []
    for p in layer.parameters():
        if p.dim() == 3:
            count, rows, columns = p.shape
            size = _parameter_bytes(p) // count
            one = LinearShape(rows, columns, size, False, p.element_size(), size if p.requires_grad else 0)
            stacked.extend([one] * count)
    values = config.to_dict()
    total = next((values[name] for name in EXPERTS if values.get(name)), None)
    used = next((values[name] for name in USED if values.get(name)), None)
    has_experts = bool(stacked) or any("experts" in name for name, _ in layer.named_modules())
    return tuple(stacked), used / total if has_experts and total and used else 1.0


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
USED = ("num_experts_per_tok", "moe_k", "moe_topk")


def _trained(model: nn.Module) -> tuple[tuple[int, int], ...]:
    sums: dict[int, int] = {}
    for p in model.parameters():
        if p.requires_grad:
            sums[p.element_size()] = sums.get(p.element_size(), 0) + p.numel()
    return tuple((count, itemsize) for itemsize, count in sorted(sums.items()))


def _tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _parameter_bytes(parameter: torch.Tensor) -> int:
    return _tensor_bytes(parameter)
