"""How busy other programs kept the machine: beside them, the speed of a run on a CPU says little."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

MUCH = 0.1  # of all CPUs


class OtherPrograms:
    """Measures from its creation to :meth:`share`. Only Linux tells."""

    def __init__(self) -> None:
        self._start = _times()

    def share(self) -> float | None:
        """The part of all CPUs' time, 0 to 1, that other programs used; None where the system does not say."""
        end = _times()
        if self._start is None or end is None or end[0] <= self._start[0]:
            return None
        total, busy, own = (after - before for before, after in zip(self._start, end))
        return min(max(busy - own, 0.0) / total, 1.0)


def caution(shares: Iterable[float | None]) -> str | None:
    """Why speeds measured beside such shares should not be compared, or None where they may be."""
    largest = max((share for share in shares if share is not None), default=0.0)
    if largest < MUCH:
        return None
    return f"other programs used up to {largest:.0%} of the CPUs meanwhile: the speeds are not comparable"


def _times() -> tuple[float, float, float] | None:
    """Seconds of all CPUs, of those the busy ones, and of those this process's (proc(5): stat)."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields[1:9])
        tick = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    busy = user + nice + system + irq + softirq + steal
    own = os.times()
    return (busy + idle + iowait) / tick, busy / tick, sum(own[:4])
