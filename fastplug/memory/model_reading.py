"""Read a model's shapes off its modules, with weights or without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fastplug.errors import ModelError
from fastplug.families import Family
from fastplug.memory.layer_reading import LayerReader, is_linear, tensor_bytes
from fastplug.memory.shapes import ModelShape
from fastplug.patching.inspection import unwrap_saved
from fastplug.patching.sites import Site


def read_model(
    model: nn.Module,
    sites: Sequence[tuple[Site, bool]],
    *,
    quant: str | None,
    rank: int | None,
    residual_dtype: torch.dtype | None,
    compute_dtype: torch.dtype | None,
    attention: str | None,
    name: str,
) -> ModelShape:
    """See :meth:`fastplug.memory.shapes.ModelShape.of_model`."""
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
    read = LayerReader(quant, rank, compute)
    layers = tuple(read.layer(site, fused, config) for site, fused in sites)
    inside = {id(p) for site, _ in sites for p in site.module.parameters()}
    outside = [(name, p) for name, p in base.named_parameters() if id(p) not in inside]
    other = sum(tensor_bytes(p) for _, p in outside)
    other += sum(tensor_bytes(b) for _, b in base.named_buffers())
    if quant is not None:
        other -= read.saved_outside(base, inside, head)
    head_weight = unwrap_saved(head)
    head_weight = getattr(head_weight, "base_layer", head_weight)
    weight: Any = getattr(head_weight, "weight", embedding)
    stream = residual_dtype or embedding.dtype
    return ModelShape(
        layers=layers,
        hidden=config.hidden_size,
        vocabulary=weight.shape[0],
        head_itemsize=weight.element_size(),
        head_trained=tensor_bytes(weight) if weight.requires_grad and not rank else 0,
        tied=weight is embedding,
        other_bytes=other - sum(tensor_bytes(p) for name, p in outside if "lora_" in name),
        other_trained=0 if rank else sum(tensor_bytes(p) for _, p in outside if p.requires_grad),
        trained=_trained(base) if not rank else ((sum(layer.adapter_bytes for layer in layers) // 4, 4),),
        stream_itemsize=stream.itemsize,
        compute_itemsize=compute,
        attention=attention or str(getattr(config, "_attn_implementation", None) or "sdpa"),
        name=name or str(getattr(config, "_name_or_path", "") or type(base).__name__),
    )


def decoder_layers(model: nn.Module, options: Any = None) -> list[tuple[Site, bool]]:
    """The decoder layers of a model, and whether fastplug runs each as a whole. Nothing is changed.

    Args:
        model: Patched or not, with weights or on the meta device.
        options: :class:`fastplug.Options` under which it is or would be patched.
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


def _trained(model: nn.Module) -> tuple[tuple[int, int], ...]:
    sums: dict[int, int] = {}
    for p in model.parameters():
        if p.requires_grad:
            sums[p.element_size()] = sums.get(p.element_size(), 0) + p.numel()
    return tuple((count, itemsize) for itemsize, count in sorted(sums.items()))


__all__ = ["decoder_layers", "read_model"]
