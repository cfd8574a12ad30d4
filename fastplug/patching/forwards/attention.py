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
from torch.nn import functional as F

from fastplug.families import Family
from fastplug.memory.kept_attention import keep, keeping_sdpa
from fastplug.ops.document_attention import DocumentMask, choose, document_attention
from fastplug.ops.lora.attention_input import AttentionInput, Norm, attention_input
from fastplug.ops.lora.group import Group
from fastplug.ops.lora.linear import lora_linear
from fastplug.ops.rope.autograd import rope
from fastplug.patching import caches
from fastplug.patching.forwards.blocks import interception, read_group, read_projections
from fastplug.patching.norms import read_norm
from fastplug.patching.sites import Binding, Implementation, NotCovered, Runtime, Site

NormRead = tuple[torch.Tensor, Norm]


@dataclass(frozen=True)
class After:
    """q/k norms that are not over single heads before RoPE, or come without one: they run as they are."""

    norms: tuple[nn.Module, nn.Module]
    rotate: bool


@dataclass(frozen=True)
class Plan:
    """An attention module as it is at this call."""

    spec: AttentionInput
    out: Group
    norm_weight: torch.Tensor | None
    head_weights: tuple[torch.Tensor | None, torch.Tensor | None]
    after: After | None = None  # what is left to do to q and k by modules of the model


def uncovered(kwargs: dict[str, Any]) -> str | None:
    """Why the fused path does not cover a call with these arguments, or None."""
    if kwargs.get("position_embeddings") is None:
        return "no position embeddings were given to the attention"
    if kwargs["position_embeddings"][0].dim() != 3:
        return "the position embeddings are of several axes"
    if kwargs.get("output_attentions"):
        return "attention weights were asked for"
    odd = caches.unknown(kwargs)
    if odd is not None:
        return f"a cache is given as {odd!r}, a name that is not known here"
    return None


def plan(attention: nn.Module, family: Family, runtime: Runtime, x: torch.Tensor, norm: NormRead | None) -> Plan | str:
    """Read the module's present state, or say why the fused path does not cover it."""
    qkv = read_group(attention, family.qkv, x, runtime)
    if isinstance(qkv, str):
        return qkv
    out = read_group(attention, (family.out,), x, runtime)
    if isinstance(out, str):
        return out
    head_norm: Norm | None = None
    head_weights: list[torch.Tensor | None] = [None, None]
    after: After | None = None
    rotate = family.rope.turns(attention)
    if family.qk_norm is not None and getattr(attention, family.qk_norm.names[0], None) is not None:
        if not rotate or family.norm.kind != "rms" or family.qk_norm.shape != "heads" or family.qk_norm.after_rope:
            first, second = (getattr(attention, name) for name in family.qk_norm.names)
            after = After((first, second), rotate)
        else:
            for i, name in enumerate(family.qk_norm.names):
                found = read_norm(getattr(attention, name), family)
                if isinstance(found, str):
                    return f"{name} {found}"
                head_weights[i], head_norm = found
    head_dim: int = getattr(attention, family.head_dim)  # type: ignore[assignment]
    widths: tuple[int, int, int] | None = None
    if len(family.qkv) == 1 and family.qkv_layout == "blocks":
        config: Any = attention.config
        queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        widths = (queries, keys, keys)
        if sum(widths) != qkv.out_features:
            return f"{family.qkv[0]} has {qkv.out_features} outputs where the config asks for {sum(widths)}"
    spec = AttentionInput(
        qkv,
        head_dim,
        norm[1] if norm else None,
        head_norm,
        widths,
        family.qkv_layout == "heads",
        rotate and after is None,
        family.rope.layout == "interleaved",
    )
    return Plan(spec, out, norm[0] if norm else None, (head_weights[0], head_weights[1]), after)


def run(
    planned: Plan, attention: nn.Module, family: Family, runtime: Runtime, x: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """(output [B, S, hidden], residual stream, attention weights); ``kwargs`` are those of the module's forward."""
    cos, sin = kwargs["position_embeddings"]
    c, s = (cos, sin) if family.rope.table == "half" else family.rope.tables(cos, sin)
    q, k, v, stream = attention_input(planned.spec, x, c, s, planned.norm_weight, *planned.head_weights)
    if planned.after is not None:
        q, k = _after(planned.after, family, runtime, q, k, c, s)
    if family.query_scale is not None:
        q = q * family.query_scale(attention, kwargs).to(q.dtype)
    mixed, weights = attend(attention, family, runtime, q, k, v, cos, sin, kwargs)
    out = lora_linear(planned.out, mixed.reshape(*x.shape[:-1], -1))
    if family.output_dropout is not None and attention.training:
        out = F.dropout(out, getattr(attention, family.output_dropout))  # type: ignore[arg-type]
    return out, stream, weights


def _after(
    after: After,
    family: Family,
    runtime: Runtime,
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k [B, heads, S, D], normalized by the model's own modules and turned."""
    row = family.qk_norm
    assert row is not None
    pair = [q, k]

    def normalize() -> None:
        for i, norm in enumerate(after.norms):
            x = pair[i]
            if row.shape == "heads_first":
                pair[i] = norm(x)
                continue
            x = x.transpose(1, 2)
            pair[i] = (norm(x) if row.shape == "heads" else norm(x.flatten(-2)).view(x.shape)).transpose(1, 2)

    if not row.after_rope:
        normalize()
    if after.rotate:
        turned = rope(
            pair[0].transpose(1, 2),
            pair[1].transpose(1, 2),
            cos,
            sin,
            interleaved=family.rope.layout == "interleaved",
            implementation=runtime.ops.rope,
        )
        pair = [part.transpose(1, 2) for part in turned]
    if row.after_rope:
        normalize()
    return pair[0], pair[1]


def forward(module: nn.Module, binding: Binding, *args: Any, **kwargs: Any) -> Any:
    kwargs = {**dict(zip(binding.parameters, args)), **kwargs}
    hidden_states: torch.Tensor = kwargs.pop("hidden_states")
    family, runtime = binding.family, binding.runtime
    planned = interception(module, ()) or uncovered(kwargs) or plan(module, family, runtime, hidden_states, None)
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
    newly = caches.NEW in rest
    cache = caches.take(rest)
    has_position = "cache_position" in rest
    position = rest.pop("cache_position", None)
    for name, source in family.attention_arguments.items():
        rest[name] = getattr(attention, source) if isinstance(source, str) else source(attention)
    if cache is not None:
        if has_position:  # transformers < 5.3 hands these to static caches, 4.51 the window too
            details = {"sin": sin, "cos": cos, "cache_position": position}
            if "sliding_window" in rest:
                details["sliding_window"] = rest["sliding_window"]
            k, v = cache.update(k, v, attention.layer_idx, details)
        elif newly:
            k, v = cache.update(k, v, attention.layer_idx, kwargs=rest)
        else:
            k, v = cache.update(k, v, attention.layer_idx)
    implementation: str = attention.config._attn_implementation  # type: ignore[assignment, union-attr]
    if implementation == "eager":
        function = sys.modules[family.module].eager_attention_forward
    else:
        function = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS[implementation]
    dropout: Any = attention.attention_dropout if attention.training else 0.0
    if torch.compiler.is_compiling() and caches.stands_in(cache) and _sees_all(attention, q):
        mask = None
    if type(mask) is DocumentMask and implementation == "sdpa" and _documents_only(q, k, dropout, rest):
        scaling: Any = attention.scaling
        arguments = (mask.documents, mask.window, scaling)
        if choose(q, *arguments[:2]) == "varlen":
            return keep(document_attention, q, k, v, *arguments), None
        with keeping_sdpa():
            return document_attention(q, k, v, *arguments), None

    def own(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return function(  # type: ignore[no-any-return]
            attention, q, k, v, mask, dropout=dropout, scaling=attention.scaling, **rest
        )

    if implementation.startswith("flash"):
        return keep(own, q, k, v)  # type: ignore[no-any-return]
    with _backend(runtime, implementation, q, mask, dropout), keeping_sdpa():
        return own(q, k, v)


def _sees_all(attention: nn.Module, q: torch.Tensor) -> bool:
    """Whether each token of q [B, heads, S, D] sees all before it in a step without a mask and with documents in none
    of its rows: while it is traced, transformers makes a mask for it all the same, with which no flash kernel runs."""
    config: Any = attention.config
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    limits = (window, getattr(config, "attention_chunk_size", None))
    causal = bool(getattr(attention, "is_causal", True))
    return causal and all(limit is None or q.shape[2] < limit for limit in limits)


def _documents_only(q: torch.Tensor, k: torch.Tensor, dropout: float, arguments: dict[str, Any]) -> bool:
    """Whether attention within documents is all that the model asks of ``sdpa``."""
    asked = [arguments.get(name) for name in ("position_bias", "softcap", "s_aux", "cache", "output_attentions")]
    return not dropout and q.shape[2] == k.shape[2] and all(value is None or value is False for value in asked)


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
