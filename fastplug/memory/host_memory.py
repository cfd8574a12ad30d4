"""How much memory the host has left, and pinned pieces of it that are used again and again."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fastplug.errors import HostMemoryError
from fastplug.memory.saved import PIECE

RESERVE = 2**30  # bytes that are left to everything else
LIMITS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)  # of a container, in either version of cgroups


def available(meminfo: Path = Path("/proc/meminfo"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process may still take without anyone being swapped out or killed; None where nobody says."""
    known = [size for size in (_of_system(meminfo), _of_container(cgroups)) if size is not None]
    if not known and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        known = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    return min(known, default=None)


def _of_system(meminfo: Path) -> int | None:
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _of_container(cgroups: Path) -> int | None:
    """What a container's limit leaves; file caches count as free, since they give way."""
    for limit, used in LIMITS:
        try:
            most, now = (cgroups / limit).read_text().strip(), int((cgroups / used).read_text())
            statistics = (cgroups / limit).with_name("memory.stat").read_text().split()
            caches = int(statistics[statistics.index("inactive_file") + 1]) if "inactive_file" in statistics else 0
            return None if most == "max" else max(int(most) - now + caches, 0)
        except (OSError, ValueError):
            continue
    return None


def check_host_memory(wanted: int, purpose: str = "offloading the inputs of decoder layers") -> None:
    """Make sure that ``wanted`` more bytes of host memory are there, beside a reserve of 1 GiB for everything else.

    Raises:
        HostMemoryError: There are not, with both numbers.
    """
    free = available()
    if free is not None and wanted > free - RESERVE:
        raise HostMemoryError(
            f"fastplug: {purpose} needs {wanted / 2**30:.1f} GiB of host memory and {free / 2**30:.1f} GiB are "
            f"available, of which {RESERVE / 2**30:.0f} GiB stays free; give the process more memory, make the batch "
            "or the sequence shorter, or choose a budget under which less is offloaded"
        )


def copy_rate(device: torch.device) -> float | None:
    """10^9 bytes a second of copies to pinned host memory, measured by a few; None where copies are of another kind."""
    if device.type != "cuda":
        return None
    source = torch.empty(PIECE, dtype=torch.uint8, device=device)
    target = torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
    times = []
    for _ in range(4):
        begun, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        target.copy_(source, non_blocking=True)
        done.record()
        done.synchronize()
        times.append(begun.elapsed_time(done))
    return PIECE / min(times) / 1e6


class HostPool:
    """Pieces of host memory of one size, so that what one step used fits any tensor of the next.

    The size is a power of 2, as PyTorch allocates pinned memory, and takes 0.3 ms over PCIe 5.

    Args:
        pinned: Whether the pieces are page-locked, as asynchronous copies from and to a CUDA device need.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.free: list[torch.Tensor] = []
        self.pieces = 0  # how many there are, in use or not

    def take(self, size: int) -> list[torch.Tensor]:
        """Pieces for ``size`` bytes.

        Raises:
            HostMemoryError: The host has too little memory left for those that have to be made.
        """
        count = -(-size // PIECE)
        missing = count - len(self.free)
        if missing > 0:
            check_host_memory(missing * PIECE)
            try:
                self.free += [torch.empty(PIECE, dtype=torch.uint8, pin_memory=self.pinned) for _ in range(missing)]
            except (RuntimeError, MemoryError) as error:
                raise HostMemoryError(
                    f"fastplug: the host gave no {missing * PIECE / 2**30:.2f} GiB of "
                    f"{'pinned ' if self.pinned else ''}memory for offloading, after {self.pieces * PIECE / 2**30:.1f} "
                    f"GiB before ({error}); raise its limit (ulimit -l), or choose a budget under which less "
                    "is offloaded"
                ) from error
            self.pieces += missing
        taken = self.free[len(self.free) - count :] if count else []
        del self.free[len(self.free) - count :]
        return taken

    def give(self, pieces: list[torch.Tensor]) -> None:
        """Take back what :meth:`take` gave."""
        self.free += pieces


__all__ = ["PIECE", "HostPool", "available", "check_host_memory", "copy_rate"]
