"""Which linear modules of a model compute their base in FP8."""

from __future__ import annotations

import fnmatch
import weakref

import torch
from torch import nn

from fastplug.errors import OptionError
from fastplug.ops.fp8.device import fp8_reason
from fastplug.ops.lora.fp8_base import MULTIPLE, Fp8
from fastplug.options import Options
from fastplug.patching.sites import Runtime
from fastplug.patching.weights import keeping


def prepare(model: nn.Module, device: torch.device, runtime: Runtime) -> str | None:
    """Set the runtime up for ``Options.compute``; returns what the report says about it, None for exact arithmetic.

    Raises:
        OptionError: The device has no FP8 products, or a pattern of ``Options.exact`` names no linear module.
    """
    options = runtime.options
    if options.compute == "exact":
        return None
    reason = fp8_reason(device, runtime.ops.fp8.product)
    if reason is not None:
        raise OptionError(f"fastplug: compute={options.compute!r} is not possible: {reason}; leave compute='exact'")
    runtime.fp8 = Fp8(options.compute == "fp8", keeping(options.fp8_weights, options))
    linears = _linears(model, runtime)
    exact = _named(linears, options)
    runtime.exact = weakref.WeakSet(exact)
    rest = {name: linear for name, linear in linears.items() if linear not in runtime.exact}
    magnified = {id(layer.base_layer) for layer in model.modules() if len(getattr(layer, "lora_magnitude_vector", ()))}
    dora = {name for name, linear in rest.items() if id(linear) in magnified}
    odd = [
        name
        for name, linear in rest.items()
        if name not in dora and any(size % MULTIPLE for size in _shape(linear, runtime))
    ]
    what = "gradients of activations, and recomputed outputs," if options.compute == "fp8_backward" else "products"
    count = len(rest) - len(odd) - len(dora)
    note = f"{what} of {count} frozen linear modules are computed in FP8 (e4m3) where the step is in bf16"
    if exact:
        note += f"; {len(exact)} stay exact as told"
    if dora:
        note += f"; {len(dora)} stay exact because they have DoRA, whose norms follow from the exact product"
    if odd:
        note += f"; {len(odd)} stay exact because their sizes are no multiples of {MULTIPLE} (the first is {odd[0]})"
    return note


def _linears(model: nn.Module, runtime: Runtime) -> dict[str, nn.Module]:
    """Frozen linear modules below the head by name, those under an adapter by the adapter's name."""
    heads = {id(getattr(module, "lm_head", None)) for module in model.modules()}
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if runtime.codec(module) is not None and id(module) not in heads and not _inside_adapter(name)
        and not any(p.requires_grad for p in module.parameters(recurse=False))
    }  # fmt: skip


def _inside_adapter(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def _shape(linear: nn.Module, runtime: Runtime) -> tuple[int, ...]:
    codec = runtime.codec(linear)
    weight = "" if codec is None else codec.read(linear)
    return () if isinstance(weight, str) else weight.shape


def _named(linears: dict[str, nn.Module], options: Options) -> list[nn.Module]:
    found: dict[str, nn.Module] = {}
    for pattern in options.exact:
        matching = {name: linear for name, linear in linears.items() if _matches(name, pattern)}
        if not matching:
            some = ", ".join(list(linears)[:3]) or "none"
            raise OptionError(
                f"fastplug: exact={pattern!r} names no frozen linear module; there are {len(linears)}, such as {some}"
            )
        found |= matching
    return list(found.values())


def _matches(name: str, pattern: str) -> bool:
    """Whether the pattern names the module, or one that it is part of, with or without what stands before it."""
    parts = name.split(".")
    wholes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return any(fnmatch.fnmatchcase(whole, pattern) or fnmatch.fnmatchcase(whole, f"*.{pattern}") for whole in wholes)
