"""The highest memory of one stretch of a program: exact on a GPU, by the kernel's own mark on Linux."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GPU = "peak allocated on the GPU"
CPU = "peak growth of resident memory"
UNKNOWN = "not measured: only Linux lets a process reset its memory mark"


class PeakMemory:
    """Measures from its creation to :meth:`read`.

    On a GPU the count is PyTorch's: weights, activations, gradients and optimizer state together. On a CPU it is how
    far the resident memory of the process rose above its level at the start, that is without weights loaded before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind = UNKNOWN
        self._start: int | None = None
        gc.collect()
        if device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.kind = GPU
        elif sys.platform == "linux":
            _return_freed_pages()
            self._start = _reset_mark()
            if self._start is not None:
                self.kind = CPU

    def read(self) -> int | None:
        """Bytes, or None where ``kind`` says why not."""
        if self.device.type == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated(self.device))
        peak = _status("VmHWM") if self._start is not None else None
        return None if peak is None or self._start is None else peak - self._start


def _return_freed_pages() -> None:
    """What an earlier run freed goes back to the system, or the next run would live in it unseen (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_mark() -> int | None:
    """Set the kernel's peak to the present level (proc(5): clear_refs, value 5); returns that level in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    level, peak = _status("VmRSS"), _status("VmHWM")
    if level is None or peak is None or peak > level + (64 << 20):  # accepted but without effect, as in some sandboxes
        return None
    return level


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None
