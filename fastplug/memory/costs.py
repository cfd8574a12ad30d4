"""What each policy costs each layer: the contract between the cost model, measurements and the solver.

The solver of ``solve.py`` knows nothing but these numbers. They come from shapes (``bytes.py``, ``times.py``) before
anything ran; once a few steps did, ``calibration.py`` scales them by what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fastplug.memory.policy import Policy

BESIDE = 0.05
"""Share of its time by which a copy slows the computation beside it, as it does on a quiet machine."""


@dataclass(frozen=True)
class PolicyCost:
    """One layer under one policy.

    The allocator's view of a step: layer i begins its forward when the layers before it hold ``saved`` bytes each, and
    its backward begins when the layers after it have freed theirs. ``forward_peak`` and ``backward_peak`` are the most
    that layer i has at a time then, its own saved tensors included, above what the layers before it hold.

    Attributes:
        saved: Bytes on the device from the layer's forward to its backward.
        forward_peak: Highest bytes during the forward, the layer's saved tensors and its output included.
        backward_peak: Highest bytes during the backward, saved and recomputed tensors included.
        ms: Milliseconds of forward, recomputation and backward together, without waiting for copies.
        host: Bytes in pinned host memory from forward to backward.
        shared: Bytes on the device that exist once, however many layers have this policy (staging buffers).
        forward_ms: The forward's part of ``ms``.
        copy_ms: Milliseconds of copying ``host`` one way, beside the computation.
    """

    saved: int
    forward_peak: int
    backward_peak: int
    ms: float
    host: int = 0
    shared: int = 0
    forward_ms: float = 0.0
    copy_ms: float = 0.0

    def waiting(self, every: int = 1) -> float:
        """Milliseconds that copies add to forward and backward where one layer of ``every`` has this policy."""
        times = (self.forward_ms, self.ms - self.forward_ms)
        return sum(max(0.0, self.copy_ms - every * time) + BESIDE * self.copy_ms for time in times)


@dataclass(frozen=True)
class LayerCosts:
    """One decoder layer under each policy that it may have.

    Attributes:
        policies: Policy -> cost. A layer that fastplug does not run has a single one.
        gradients: Bytes of parameter gradients that the layer's backward leaves behind.
    """

    policies: Mapping[Policy, PolicyCost]
    gradients: int = 0

    def __getitem__(self, policy: Policy) -> PolicyCost:
        return self.policies[policy]

    def only(self, *policies: Policy) -> LayerCosts:
        """The same with a choice of ``policies``; with all where it has none of them."""
        kept = {policy: cost for policy, cost in self.policies.items() if policy in policies}
        return replace(self, policies=kept or dict(self.policies))
