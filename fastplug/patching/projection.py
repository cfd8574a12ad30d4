"""Read a linear module, with the LoRA adapter that is active on it now, into what the ops compute with.

Everything is read at the call: PEFT changes adapters between steps (``disable_adapter()`` in DPO, ``set_adapter``,
merges), FSDP2 and ZeRO replace parameters. What is not covered exactly is answered with a reason.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import nn

from fastplug.ops.lora.group import Projection
from fastplug.patching.inspection import intercepted, unwrap_saved
from fastplug.patching.sites import Runtime
from fastplug.sharding import SHARDED, own_class, whole

PEFT_LINEAR = {
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
    ("peft.tuners.lora.hqq", "HqqLoraLinear"),
    ("peft.tuners.lora.gptq", "GPTQLoraLinear"),
    ("peft.tuners.lora.awq", "AwqLoraLinear"),
    ("peft.tuners.lora.torchao", "TorchaoLoraLinear"),
}


def read(module: nn.Module, runtime: Runtime, inside: bool = False) -> Projection | str:
    """The projection that ``module`` is at present, or the reason why no fused op covers it.

    ``inside`` tells that this is within a call of the module, so that its hooks have run or will.
    """
    reason = None if inside else intercepted(module)
    if reason is not None:
        return f"has {reason}"
    kind = own_class(type(module))
    codec = runtime.codec(module)
    if codec is not None:
        return _base(module, runtime)
    if (kind.__module__, kind.__qualname__) in PEFT_LINEAR:
        return _adapted(module, runtime)
    unwrapped = unwrap_saved(module)
    if isinstance(unwrapped, str):
        return f"has {unwrapped}"
    if unwrapped is not module:
        return read(unwrapped, runtime)
    return f"is a {kind.__module__}.{kind.__qualname__}, which no codec and no adapter reader covers"


def _base(linear: nn.Module, runtime: Runtime) -> Projection | str:
    codec = runtime.codec(linear)
    if codec is None:
        return f"rests on a {type(linear).__name__}, for which there is no codec"
    weight = codec.read(linear)
    if isinstance(weight, str):
        return f"cannot be read: {weight}"
    # FSDP1 hands out views of one flat parameter, which all need a gradient if one of its parts does.
    own = getattr(linear, "weight", None)
    trained = own if weight.tensors[0] is own and weight.tensors[0].requires_grad else None
    # The weight is read again in the backward, after the host has unsharded it again.
    return Projection(
        functools.partial(codec.read, linear),  # type: ignore[arg-type]
        weight.shape,
        bias=linear.bias,  # type: ignore[arg-type]
        trained=trained,  # type: ignore[arg-type]
        owner=linear,
    )


def _adapted(layer: nn.Module, runtime: Runtime) -> Projection | str:
    base: nn.Module = layer.base_layer  # type: ignore[assignment]
    reason = intercepted(base)
    if reason is not None:
        return f"has {reason} on its base layer"
    projection = _base(base, runtime)
    if isinstance(projection, str):
        return projection
    if layer.disable_adapters:
        return "has a merged adapter that is disabled" if layer.merged else projection
    if layer.merged:
        return projection
    active = [name for name in layer.active_adapters if name in layer.lora_A]  # type: ignore[operator, union-attr]
    if not active:
        return projection
    if getattr(layer, "fan_in_fan_out", False):
        return "stores its weight transposed (fan_in_fan_out)"
    if not getattr(layer, "cast_input_dtype_enabled", True):
        return "has PEFT's input cast disabled"
    found: list[_Adapter] = []
    for name in active:
        adapter = _read_adapter(layer, name)
        if isinstance(adapter, str):
            return adapter
        found.append(adapter)
    return _put(projection, found)


class _Adapter(NamedTuple):
    """One LoRA adapter of a layer, see :class:`Projection`; ``bias`` is that of B, scaled as its product is."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout: float
    bias: torch.Tensor | None
    magnitude: torch.Tensor | None


def _read_adapter(layer: nn.Module, name: str) -> _Adapter | str:
    parts: Any = layer
    a, b, dropout = parts.lora_A[name], parts.lora_B[name], parts.lora_dropout[name]
    for part, what in ((a, "lora_A"), (b, "lora_B")):
        if type(part) is not nn.Linear or (part.bias is not None and part is a):
            return f"has a {what} that is not a plain linear layer"
        if not whole(part.weight, 2) or not (part.bias is None or whole(part.bias, 1)):
            return f"has a {what} that {SHARDED}"
        reason = intercepted(part)
        if reason is not None:
            return f"has {reason} on its {what}"
    probability = 0.0
    if type(dropout) is nn.Dropout:
        reason = intercepted(dropout)
        if reason is not None:
            return f"has {reason} on its dropout"
        probability = dropout.p if dropout.training else 0.0
    elif type(dropout) is not nn.Identity:
        return f"has a {type(dropout).__name__} for dropout"
    magnitude = _read_magnitude(layer, name)
    if isinstance(magnitude, str):
        return magnitude
    if magnitude is not None and b.bias is not None:
        return "has DoRA and a bias on its lora_B"  # which PEFT takes for a part of the update, in the norm too
    return _Adapter(a.weight, b.weight, float(parts.scaling[name]), probability, b.bias, magnitude)


def _read_magnitude(layer: nn.Module, name: str) -> torch.Tensor | str | None:
    """DoRA's magnitudes of an adapter, None where it has none, or why it is not covered."""
    variants = getattr(layer, "lora_variant", None)
    if variants is None:  # peft < 0.17
        dora = getattr(layer, "use_dora", {}).get(name, False)
    else:
        kind = type(variants[name]).__name__ if name in variants else None
        if kind not in (None, "DoraLinearVariant"):
            return f"has the LoRA variant {kind}"
        dora = kind is not None
    if not dora:
        return None
    part: Any = layer.lora_magnitude_vector[name]  # type: ignore[index]
    if type(part).__name__ != "DoraLinearLayer" or part.fan_in_fan_out:
        return f"has a {type(part).__name__} for DoRA"
    if not whole(part.weight, 1):
        return f"has magnitudes that {SHARDED}"
    reason = intercepted(part)
    magnitudes: torch.Tensor = part.weight
    return f"has {reason} on its magnitudes" if reason is not None else magnitudes


def _put(projection: Projection, adapters: list[_Adapter]) -> Projection | str:
    """``projection`` with its active adapters: several are one of the sum of their ranks."""
    first = adapters[0]
    for adapter in adapters:
        if adapter.bias is not None:
            bias = adapter.bias * adapter.scaling
            projection.bias = bias if projection.bias is None else projection.bias + bias
    if len(adapters) == 1:
        if first.magnitude is not None and projection.trained is not None:
            return "trains the weight beneath its DoRA"
        projection.a, projection.b, projection.scaling = first.a, first.b, first.scaling
        projection.dropout, projection.magnitude = first.dropout, first.magnitude
        return projection
    if any(adapter.magnitude is not None for adapter in adapters):
        return f"has {len(adapters)} active adapters, with DoRA"
    if any(adapter.dropout for adapter in adapters):
        return f"has {len(adapters)} active adapters that drop their inputs"
    same = len({adapter.scaling for adapter in adapters}) == 1
    projection.scaling = first.scaling if same else 1.0
    projection.a = torch.cat([adapter.a for adapter in adapters])
    projection.b = torch.cat([adapter.b if same else adapter.b * adapter.scaling for adapter in adapters], dim=1)
    return projection


def base_layer(module: nn.Module) -> nn.Module:
    """The linear module that holds the base weight."""
    inner = unwrap_saved(module)
    module = module if isinstance(inner, str) else inner
    return module.base_layer if hasattr(module, "base_layer") else module  # type: ignore[return-value]


def compute_dtype(x: torch.Tensor, linears: list[nn.Module], runtime: Runtime) -> torch.dtype | str:
    """The dtype in which projections of x are computed, or why there is no single one.

    Under autocast it is autocast's; else the one the owning library would use, which must be that of x: PEFT on a
    float32 stream over a 16-bit base mixes precisions, which a fused op would not reproduce.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    if autocast and x.dtype == torch.float64:
        return "float64 hidden states under autocast"
    for linear in linears:
        base = base_layer(linear)
        codec = runtime.codec(base)
        dtype = codec.compute_dtype(base, x.dtype) if codec is not None else x.dtype
        if isinstance(dtype, str):
            return f"a {type(base).__name__} {dtype}"
        if not autocast and dtype != x.dtype:
            return (
                f"hidden states are {x.dtype} over weights that compute in {dtype}, without autocast; train with "
                "bf16=True or set residual_dtype"
            )
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
