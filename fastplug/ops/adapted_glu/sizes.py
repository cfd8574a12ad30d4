"""Sizes of the adapted gated unit's kernels: what they are compiled for, and the memory of their partial sums."""

from __future__ import annotations

from typing import NamedTuple

TILE = 64  # tokens and channels
RANKS = (16, 32, 64)  # that a kernel is compiled for; smaller ranks are filled up with zeros
MULTIPLE = 8  # of ranks and channels: 16 bytes, for the copy engine
CHUNK = 8192  # tokens of a launch of the backward, whose partial sums take 7 KiB a token in an 8B Llama


class Stretches(NamedTuple):
    """How the work of a launch is cut: lines of ``length`` units, and all ``units`` of them, one after another, in
    stretches of equal length for ``programs``."""

    length: int
    units: int
    programs: int

    @property
    def slots(self) -> int:
        """How many programs at most work on one line."""
        return -(-self.length // max(1, self.units // self.programs)) + 1


def covers(width: int, *ranks: int) -> bool:
    """Whether there is a kernel for adapters of these ranks on gated units of ``width`` channels."""
    return max(ranks) <= RANKS[-1] and not any(size % MULTIPLE for size in (width, *ranks))


def compiled_rank(*ranks: int) -> int:
    """The rank of the kernel that serves adapters of these ranks."""
    return next(rank for rank in RANKS if rank >= max(ranks))


def blocks_per_column(rank: int) -> int:
    """Blocks of ``TILE`` channels whose sums a program of the backward has in registers at once."""
    return 2 if rank == RANKS[0] else 1


def backward_bytes(tokens: int, width: int, rank: int) -> int:
    """Bytes of the partial sums of s · g B that the backward writes, by far the largest ones: 16 bits for each column
    of channels, token and rank of gate and up."""
    columns = -(-width // (TILE * blocks_per_column(rank)))
    return columns * min(tokens, CHUNK) * 2 * rank * 2
