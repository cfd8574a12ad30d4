"""What PyTorch's allocator holds beside what is in tensors."""

from __future__ import annotations

import math
from typing import NamedTuple

from fastplug.memory.budget import gib

LOOSE = 6 * 2**30
"""Bytes of weights that count like everything else. The share was measured beside 5.5 GiB of them, and makes up for
what a plan does not foresee as well. More weights do not make more of that."""


class Reserve(NamedTuple):
    """Blocks that are cut too large or too small for what comes next.

    Attributes:
        share: Their bytes, as a fraction of what is allocated.
        solid: Allocated bytes that have none beside them: large weights, which lie in blocks of their own since the
            model was loaded.
    """

    share: float = 0.0
    solid: int = 0

    @staticmethod
    def of(share: float, weights: int) -> Reserve:
        """That of a model with so many bytes of weights."""
        return Reserve(share, max(0, weights - LOOSE))

    def __str__(self) -> str:
        return f"{self.share:.0%} of that" + (f" without {gib(self.solid)} of weights" if self.solid else "")

    def beside(self, allocated: int) -> int:
        """Reserved bytes beside so many allocated ones."""
        return math.ceil(self.share * max(0, allocated - self.solid))

    def allocatable(self, reserved: int) -> int:
        """The most bytes that can be allocated of so many reserved ones."""
        return int(min(reserved, (reserved + self.share * self.solid) / (1 + self.share)))


NOTHING = Reserve()


__all__ = ["LOOSE", "NOTHING", "Reserve"]
