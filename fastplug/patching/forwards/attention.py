"""Attention: fused q/k/v projections, q/k norm and RoPE before the model's own attention function, fused LoRA after it.

``plan`` and ``run`` serve the decoder layer, with its norm; ``forward`` an attention module on its own.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastplug.families import Family
from fastplug.families.row import no_window
from fastplug.ops.lora.attention_input import AttentionInput, Norm, attention_input
from fastplug.ops.lora.group import Group
from fastplug.ops.lora.linear import lora_linear
from fastplug.patching.forwards.blocks import interception, read_group, read_projections
from fastplug.patching.norms import read_norm
from fastplug.patching.sites import Binding, Implementation, NotCovered, Runtime, Site

NormRead = tuple[torch.Tensor, Norm]


@dataclass(frozen=True)
class Plan:
    """An attention module as it is at this call."""

    spec: AttentionInput
    out: Group
    norm_weight: torch.Tensor | None
    head_weights: tuple[torch.Tensor | None, ...]


def plan(
    attention: nn.Module,
    family: Family,
    runtime: Runtime,
    x: torch.Tensor,
    norm: NormRead | None,
    kwargs: dict[str, Any],
) -> Plan | str:
    """Read the module's present state, or say why the fused path does not cover it."""
    if kwargs.get("position_embeddings") is None:
        return "no position embeddings were given to the attention"
    if kwargs.get("output_attentions"):
        return "attention weights were asked for"
    qkv = read_group(attention, family.qkv, x, runtime)
    if isinstance(qkv, str):
        return qkv
    out = read_group(attention, (family.out,), x, runtime)
    if isinstance(out, str):
        return out
    head_norm: Norm | None = None
    head_weights: list[torch.Tensor | None] = [None, None]
    for i, name in enumerate(family.qk_norm or ()):
        found = read_norm(getattr(attention, name), family)
        if isinstance(found, str):
            return f"{name} {found}"
        head_weights[i], head_norm = found
    spec = AttentionInput(qkv, attention.head_dim, norm[1] if norm else None, head_norm)  # type: ignore[arg-type]
    return Plan(spec, out, norm[0] if norm else None, tuple(head_weights))


def run(
    planned: Plan, attention: nn.Module, family: Family, runtime: Runtime, x: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """(output [B, S, hidden], residual stream, attention weights); ``kwargs`` are those of the module's forward."""
    cos, sin = kwargs["position_embeddings"]
    q, k, v, stream = attention_input(planned.spec, x, cos, sin, planned.norm_weight, *planned.head_weights)
    mixed, weights = attend(attention, family, runtime, q, k, v, cos, sin, kwargs)
    return lora_linear(planned.out, mixed.reshape(*x.shape[:-1], -1)), stream, weights


def forward(module: nn.Module, binding: Binding, *args: Any, **kwargs: Any) -> Any:
    kwargs = {**dict(zip(binding.parameters, args)), **kwargs}
    hidden_states: torch.Tensor = kwargs.pop("hidden_states")
    family, runtime = binding.family, binding.runtime
    planned = interception(module, ()) or plan(module, family, runtime, hidden_states, None, kwargs)
    if isinstance(planned, str):
        return NotCovered(planned)
    out, _, weights = run(planned, module, family, runtime, hidden_states, kwargs)
    return out, weights


def refuse(site: Site, runtime: Runtime) -> str | None:
    found = read_projections(site.module, (*site.family.qkv, site.family.out), runtime)
    return found if isinstance(found, str) else None


def attend(
    attention: nn.Module,
    family: Family,
    runtime: Runtime,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, Any]:
    """The model's own attention: cache update, then the function its ``_attn_implementation`` names."""
    rest = dict(kwargs)
    mask = rest.pop("attention_mask", None)
    rest.pop("position_embeddings", None)
    cache = rest.pop("past_key_values", None)
    cache = rest.pop("past_key_value", cache)  # its name up to transformers 4.55
    has_position = "cache_position" in rest
    position = rest.pop("cache_position", None)
    if cache is not None:
        if has_position:  # transformers < 5.3 hands these to static caches
            k, v = cache.update(k, v, attention.layer_idx, {"sin": sin, "cos": cos, "cache_position": position})
        else:
            k, v = cache.update(k, v, attention.layer_idx)
    implementation = attention.config._attn_implementation  # type: ignore[union-attr]
    if implementation == "eager":
        function = sys.modules[family.module].eager_attention_forward
    else:
        function = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS[implementation]
    if family.sliding_window is not no_window:
        rest["sliding_window"] = family.sliding_window(attention)
    dropout = attention.attention_dropout if attention.training else 0.0
    with _backend(runtime, implementation, q, mask, dropout):
        return function(  # type: ignore[no-any-return]
            attention, q, k, v, mask, dropout=dropout, scaling=attention.scaling, **rest
        )


def _backend(
    runtime: Runtime, implementation: str, q: torch.Tensor, mask: Any, dropout: Any
) -> contextlib.AbstractContextManager[Any]:
    """cuDNN's flash attention first, where it is exact, deterministic enough and the faster one: Hopper and newer."""
    if (
        implementation != "sdpa"
        or runtime.options.attention != "auto"
        or not q.is_cuda
        or mask is not None
        or dropout
        or q.dtype not in (torch.bfloat16, torch.float16)
        or q.shape[-1] > 128
        or q.shape[2] < 64
        or torch.are_deterministic_algorithms_enabled()
        or torch.version.hip is not None
        or torch.cuda.get_device_capability(q.device)[0] < 9
    ):
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


IMPLEMENTATION = Implementation("attention", "fused projections and RoPE", forward, refuse)
