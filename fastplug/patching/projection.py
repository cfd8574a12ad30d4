"""Read a linear module, with the LoRA adapter that is active on it now, into what the ops compute with.

Everything is read at the call: PEFT changes adapters between steps (``disable_adapter()`` in DPO, ``set_adapter``,
merges), FSDP2 and ZeRO replace parameters. What is not covered exactly is answered with a reason.
"""

from __future__ import annotations

import functools

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
    a_of, b_of = layer.lora_A, layer.lora_B
    active = [name for name in layer.active_adapters if name in a_of]  # type: ignore[operator, union-attr]
    if not active:
        return projection
    if len(active) > 1:
        return f"has {len(active)} active adapters"
    name = active[0]
    variant = getattr(layer, "lora_variant", None)
    if (variant is not None and name in variant) or getattr(layer, "use_dora", {}).get(name):  # type: ignore[operator]
        return "has a LoRA variant (DoRA or another)"
    if getattr(layer, "fan_in_fan_out", False):
        return "stores its weight transposed (fan_in_fan_out)"
    if not getattr(layer, "cast_input_dtype_enabled", True):
        return "has PEFT's input cast disabled"
    a, b, dropout = a_of[name], b_of[name], layer.lora_dropout[name]  # type: ignore[index]
    for part, what in ((a, "lora_A"), (b, "lora_B")):
        if type(part) is not nn.Linear or part.bias is not None:
            return f"has a {what} that is not a plain bias-free linear layer"
        if not whole(part.weight, 2):
            return f"has a {what} that {SHARDED}"
        reason = intercepted(part)
        if reason is not None:
            return f"has {reason} on its {what}"
    if type(dropout) is nn.Dropout:
        reason = intercepted(dropout)
        if reason is not None:
            return f"has {reason} on its dropout"
        projection.dropout = dropout.p if dropout.training else 0.0
    elif type(dropout) is not nn.Identity:
        return f"has a {type(dropout).__name__} for dropout"
    projection.a, projection.b = a.weight, b.weight  # type: ignore[union-attr]
    projection.scaling = float(layer.scaling[name])  # type: ignore[index]
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
