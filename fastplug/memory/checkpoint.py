"""Run a decoder layer under a memory policy."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastplug.graphs.fingerprint import Fingerprint
from fastplug.memory.kept_attention import Attentions, refusal
from fastplug.memory.offload import Offloader, address
from fastplug.memory.policy import MLPMemory, Policy
from fastplug.ops.lazy import LazyTensor
from fastplug.ops.recompute import checkpointing, recomputing
from fastplug.patching import caches
from fastplug.patching.bind import REMEMBERED
from fastplug.patching.sites import NotCovered

if TYPE_CHECKING:
    from fastplug.patching.sites import Binding, FastForward

_OWN: weakref.WeakKeyDictionary[Fingerprint, frozenset[int]] = weakref.WeakKeyDictionary()


def run(
    policy: Policy,
    fast: FastForward,
    layer: nn.Module,
    binding: Binding,
    *,
    tile_rows: int | None = None,
    **kwargs: Any,
) -> Any:
    """The result of the layer's fast forward, run so that it keeps what ``policy`` (or :func:`effective`) says.

    Random numbers and autocast are in the second pass what they were in the first; results and gradients have the same
    bits under every policy, but for tiles.

    Args:
        policy: What the layer keeps.
        fast: ``fast(layer, binding, **kwargs)``, as made by :func:`fastplug.graphs.replay.replayed`.
        layer: The decoder layer.
        binding: Its binding.
        tile_rows: How many tokens go through the gated MLP at once where the policy does not keep gate and up; None
            for all of them.
        kwargs: Those of the layer's forward, ``hidden_states`` among them, all by name.

    Returns:
        What ``fast`` returns; :class:`~fastplug.patching.sites.NotCovered` only under policies that compute no layer a
        second time. Under the others a call that the fast forward leaves to the original one runs that one,
        checkpointed, and is counted in ``binding.fallbacks``.

    Raises:
        HostMemoryError: An offloading policy, and the host has too little memory left.
    """
    policy, _ = effective(policy, layer, binding, kwargs)
    if not policy.offloads and binding.runtime.offload is not None and torch.is_grad_enabled():
        binding.runtime.offload.passed()  # as a new group does by itself
    if policy.level is Policy.DROP_GATE_UP or (tile_rows is not None and not policy.keeps_gate_up):
        kwargs["mlp_memory"] = MLPMemory(policy.level is not Policy.DROP_GATE_UP, tile_rows)
    if policy.checkpoints:
        return _checkpointed(policy, fast, layer, binding, kwargs)
    if not policy.offloads:
        return fast(layer, binding, **kwargs)
    group = offloader(binding, kwargs["hidden_states"].device).group(_of_others(layer, kwargs))
    with torch.autograd.graph.saved_tensors_hooks(group.pack, group.unpack):
        return inspect.unwrap(fast)(layer, binding, **kwargs)  # a replayed layer would hold its tensors itself


def effective(policy: Policy, layer: nn.Module, binding: Binding, kwargs: dict[str, Any]) -> tuple[Policy, str | None]:
    """The policy that a call of :func:`run` follows, and why it is not the one asked for, if it is not."""
    if policy is Policy.KEEP or not torch.is_grad_enabled():
        return Policy.KEEP, None
    if torch.compiler.is_compiling():
        return Policy.KEEP, "torch.compile decides itself what is computed again"
    if checkpointing() == "checkpointed" or recomputing():
        return Policy.KEEP, "the host checkpoints the layer"
    if not policy.checkpoints:
        if policy.keeps_gate_up or has_gated_mlp(layer, binding):
            return policy, None
        return (Policy.OFFLOAD_KEEP if policy.offloads else Policy.KEEP), "its MLP is not a gated one"
    cache = caches.given(kwargs)
    if cache is not None and not caches.stands_in(cache):
        return Policy.KEEP, "a key/value cache is filled, which a second pass would do again (pass use_cache=False)"
    if policy.keeps_attention:
        reason = attention_refusal(layer, binding)
        if reason is not None:
            return (Policy.OFFLOAD if policy.offloads else Policy.RESIDUAL), reason
    return policy, None


def has_gated_mlp(layer: nn.Module, binding: Binding) -> bool:
    """Whether the layer's MLP is one whose gate and up can be dropped, and which can run in tiles."""
    family = binding.family
    mlp = getattr(layer, family.mlp_name, None)
    return family.gate is not None and isinstance(mlp, nn.Module) and family.plays(mlp, "mlp")


def attention_refusal(layer: nn.Module, binding: Binding) -> str | None:
    """Why the attention of a layer cannot be kept while the rest is computed again, or None."""
    attention: Any = getattr(layer, binding.family.attention_name)
    dropout = getattr(attention, "attention_dropout", 0.0) if attention.training else 0.0
    return refusal(attention.config._attn_implementation, dropout)


def offloader(binding: Binding, device: torch.device | None = None) -> Offloader:
    """What moves the tensors of all layers of one ``apply``: the latest, or one of ``device``, where layers run now."""
    runtime = binding.runtime
    if runtime.offload is None or (device is not None and runtime.offload.device != device):
        runtime.offload = Offloader(torch.device(binding.report.device) if device is None else device)
    return runtime.offload  # type: ignore[no-any-return]


def _of_others(layer: nn.Module, kwargs: dict[str, Any]) -> set[int]:
    """Addresses of storages that are there whether or not the layer keeps them: its weights, cos and sin, a mask."""
    x, values = kwargs["hidden_states"], kwargs.values()
    given = (tensor for value in values for tensor in (value if isinstance(value, tuple) else (value,)))
    found = {address(t) for t in given if isinstance(t, torch.Tensor) and t is not x and not isinstance(t, LazyTensor)}
    return found.union(_own(layer))


def _own(layer: nn.Module) -> frozenset[int]:
    """Addresses of the layer's weights, known for as long as it is what it was: it has many modules to go through."""
    plans = REMEMBERED.get(layer)
    latest = None if plans is None else plans.latest
    found = None if latest is None else _OWN.get(latest)
    if found is None:
        found = frozenset(address(tensor) for tensor in (*layer.parameters(), *layer.buffers()))
        if latest is not None:
            _OWN[latest] = found
    return found


def _checkpointed(policy: Policy, fast: FastForward, layer: nn.Module, binding: Binding, kwargs: dict[str, Any]) -> Any:
    x: torch.Tensor = kwargs.pop("hidden_states")
    group = None
    hooks: AbstractContextManager[Any] = contextlib.nullcontext()
    if policy.offloads:
        fast = inspect.unwrap(fast)  # a replayed layer would hold its input itself
        group = offloader(binding, x.device).group()
        hooks = torch.autograd.graph.saved_tensors_hooks(group.pack, group.unpack)
    more: dict[str, Any] = {}
    if policy.keeps_attention:
        attentions = Attentions(group)
        more["context_fn"] = lambda: (attentions.first(), attentions.second())

    def forward(x: torch.Tensor, **kwargs: Any) -> Any:
        result = fast(layer, binding, hidden_states=x, **kwargs)
        if type(result) is not NotCovered:
            return result
        if result.reason is not None and not recomputing():
            binding.fallbacks[result.reason] += 1
        kwargs.pop("mlp_memory", None)
        return binding.base.forward(layer, x, **kwargs)

    with hooks:  # what the checkpoint itself saves is x; what runs inside of it has the checkpoint's hooks
        return checkpoint(forward, x, use_reentrant=False, **more, **kwargs)


__all__ = ["attention_refusal", "effective", "has_gated_mlp", "offloader", "run"]
