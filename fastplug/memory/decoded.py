"""Decoded weights of a quantized base under plans: how many stay, and which layers leave theirs to the next forward."""

from __future__ import annotations

from collections.abc import Iterable

from fastplug.memory.plan import DECODED, Plan
from fastplug.ops.lora.kept_weights import KeptWeights


class DecodedWeights:
    """Those of one model.

    Args:
        kept: What its layers keep; of those with a limit a plan says how many bytes stay.
        counted: Whether the device's allocator counts them. A CPU's keeps no books.
    """

    def __init__(self, kept: Iterable[KeptWeights] = (), counted: bool = False) -> None:
        self._kept, self._counted = tuple(kept), counted
        self._leaving = 0  # layers, from the first on, that leave theirs

    def follow(self, plan: Plan, leaving: int) -> None:
        """Keep what the plan says; ``leaving`` layers, from the first one on, may leave theirs to the next forward."""
        self._leaving = leaving
        self._limit(plan.parts.get(DECODED, 0))

    def enter(self, index: int) -> None:
        """The forward of this layer begins."""
        for kept in self._kept:
            kept.leaves = index < self._leaving

    def spare(self) -> int:
        """Let go of all of it; the bytes."""
        return self._limit(0) + sum(kept.let_go() for kept in self._kept)

    def size(self) -> int:
        """Bytes of what comes and goes by a plan, as the allocator counts them."""
        if not self._counted:
            return 0
        return sum(kept.handed + (0 if kept.limit is None else kept.held) for kept in self._kept)

    def _limit(self, size: int) -> int:
        """Keep so many bytes; returns those that went."""
        return sum(kept.limit_to(size) for kept in self._kept if kept.limit is not None)


__all__ = ["DecodedWeights"]
