"""Read a decoder layer: which linear layers it has, what its attention and norms are, how its weights are stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastplug.families import Family
from fastplug.memory.formats import encoded_bytes, stored_bytes
from fastplug.memory.shapes import LayerShape, Linears, LinearShape
from fastplug.patching.inspection import unwrap_saved
from fastplug.patching.sites import Site
from fastplug.sharding import distributed, own_class


class LayerReader:
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
            extra_weights=sum(tensor_bytes(p) for p in extra),
            extra_trained=0 if self.rank else sum(tensor_bytes(p) for p in extra if p.requires_grad),
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
        trained = sum(tensor_bytes(p) for p in base.parameters(recurse=False) if p.requires_grad)
        if self.quant is not None:
            bias = 0 if getattr(base, "bias", None) is None else tensor_bytes(base.bias)
            size, decoded = encoded_bytes(self.quant, out_features, in_features) + bias, True
        else:
            plain = type(weight) in (nn.Parameter, torch.Tensor) or (weight is not None and distributed(weight))
            decoded = not (dense and plain and weight.is_floating_point() and weight.element_size() >= 2)
            size = stored_bytes(base)
        rank, itemsize, drops = _adapter(inner) if self.rank is None else (self.rank, 4, False)
        magnitudes = self.rank is None and _has_magnitudes(inner)
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
            magnitudes,
        )

    def saved_outside(self, base: Any, inside: set[int], head: Any) -> int:
        """Bytes that the format saves on linear layers outside the decoder layers, the head left out."""
        assert self.quant is not None
        saved = 0
        for module in base.modules():
            if type(module) is nn.Linear and module is not head and id(module.weight) not in inside:
                shape = linear_shape(module)
                saved += tensor_bytes(module.weight) - encoded_bytes(self.quant, *shape)
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


def _has_magnitudes(module: Any) -> bool:
    """Whether an active adapter is a DoRA."""
    known = getattr(module, "lora_magnitude_vector", None) or ()
    return any(name in known for name in getattr(module, "active_adapters", ()))


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


def _experts(layer: nn.Module, config: Any, reader: LayerReader) -> tuple[Linears, float]:
    """Experts that are stacked into one tensor, and the share of all experts that a token goes through."""
    stacked = []
    for p in layer.parameters():
        if p.dim() == 3:
            count, rows, columns = p.shape
            size = tensor_bytes(p) // count
            one = LinearShape(rows, columns, size, False, p.element_size(), size if p.requires_grad else 0)
            stacked.extend([one] * count)
    values = config.to_dict()
    total = next((values[name] for name in EXPERTS if values.get(name)), None)
    used = next((values[name] for name in USED if values.get(name)), None)
    has_experts = bool(stacked) or any("experts" in name for name, _ in layer.named_modules())
    return tuple(stacked), used / total if has_experts and total and used else 1.0


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
USED = ("num_experts_per_tok", "moe_k", "moe_topk")


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


__all__ = ["LayerReader", "is_linear", "linear_shape", "linears", "tensor_bytes"]
