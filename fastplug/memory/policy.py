"""What a decoder layer keeps between its forward and its backward."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Policy(str, Enum):
    """What a decoder layer keeps, from most device memory to least; ``saved.py`` counts the tensors of each."""

    KEEP = "keep"
    """What the fused nodes save anyway: no GEMM is computed again, norms and activations are."""

    DROP_GATE_UP = "drop_gate_up"
    """Gate and up are computed again: two GEMMs."""

    KEEP_ATTENTION = "keep_attention"
    """The layer's input and attention's output stay; all but attention is computed again, as in RESIDUAL."""

    RESIDUAL = "residual"
    """Only the layer's input stays; all is computed again but what backward does not need (the last projection)."""

    OFFLOAD_KEEP = "offload_keep"
    """What KEEP keeps, in pinned host memory: nothing is computed again. Copying it takes longer than the layer does,
    so one layer in every few has it."""

    OFFLOAD_DROP_GATE_UP = "offload_drop_gate_up"
    """What DROP_GATE_UP keeps, in pinned host memory."""

    OFFLOAD_ATTENTION = "offload_attention"
    """What KEEP_ATTENTION keeps, in pinned host memory."""

    OFFLOAD = "offload"
    """What RESIDUAL keeps, in pinned host memory."""

    @property
    def level(self) -> Policy:
        """The policy that keeps the same tensors on the device."""
        return LEVELS.get(self, self)

    @property
    def checkpoints(self) -> bool:
        """Whether the layer's forward runs a second time in the backward."""
        return self.level in (Policy.KEEP_ATTENTION, Policy.RESIDUAL)

    @property
    def keeps_attention(self) -> bool:
        """Whether attention itself is never computed again."""
        return self.level is not Policy.RESIDUAL

    @property
    def keeps_gate_up(self) -> bool:
        """Whether gate and up are never computed again."""
        return self.level is Policy.KEEP

    @property
    def offloads(self) -> bool:
        """Whether what stays lies in host memory."""
        return self in LEVELS


LEVELS = {
    Policy.OFFLOAD_KEEP: Policy.KEEP,
    Policy.OFFLOAD_DROP_GATE_UP: Policy.DROP_GATE_UP,
    Policy.OFFLOAD_ATTENTION: Policy.KEEP_ATTENTION,
    Policy.OFFLOAD: Policy.RESIDUAL,
}
SPREAD = Policy.OFFLOAD_KEEP
"""The policy whose layers stand so far apart that their copies pass beside the computation."""


@dataclass(frozen=True)
class MLPMemory:
    """What the gated MLP of a layer is told.

    Attributes:
        keep_gate_up: Whether gate and up stay for the backward; else they are computed again there.
        tile_rows: How many rows (tokens) go through the MLP at once, or None for all. Tiles keep no gate and up.
    """

    keep_gate_up: bool = True
    tile_rows: int | None = None
