"""Settings of PyTorch's CUDA allocator while a plan holds, and the ones that were there before.

They belong to the process: PyTorch has one limit for each device, and one set of options.
"""

from __future__ import annotations

import functools
import os
import sys
import weakref

import torch

EXPANDABLE = "expandable_segments"
_configure = getattr(
    torch._C,
    "_accelerator_setAllocatorSettings",
    getattr(torch._C, "_cuda_cudaCachingAllocator_set_allocator_settings", None),  # in older versions
)


class Allocator:
    """The allocator of one CUDA device. What is set here is undone by :meth:`restore`, or when this object is dropped.

    Args:
        device: Whose memory it hands out.
        total: Bytes of the device.
    """

    def __init__(self, device: torch.device, total: int) -> None:
        self._device, self._total = device, total
        self._before = 1.0  # the share of the device that it was limited to
        self._unlimit: weakref.finalize[..., Allocator] | None = None
        self._shrink: weakref.finalize[..., Allocator] | None = None
        self._expands: bool | None = None

    def limit(self, size: int) -> None:
        """Reserve ``size`` bytes at most."""
        limit = torch.cuda.set_per_process_memory_fraction
        if self._unlimit is None:
            read = getattr(torch.cuda, "get_per_process_memory_fraction", None)
            self._before = float(read(self._device)) if read is not None else 1.0
            self._unlimit = _at_the_end(self, functools.partial(limit, self._before, self._device))
        limit(float(min(self._before, max(size, 0) / self._total)), self._device)

    def expand(self) -> bool:
        """Turn expandable segments on, unless the user has set them, on or off; whether they are on by this.

        Their memory is mapped page by page, so scattered pieces that are free can serve as one.
        """
        if self._expands is None:
            self._expands = self._expand()
        return self._expands

    def _expand(self) -> bool:
        chosen = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
        if EXPANDABLE in chosen or _configure is None or os.name == "nt" or torch.version.hip is not None:
            return False
        # Memory pools, in which vLLM's sleep mode keeps weights and caches, do not go with them: pytorch issue 147851.
        if torch.cuda.get_allocator_backend() != "native" or "vllm" in sys.modules:
            return False
        # Some versions take what is not named for the default.
        on, off = (",".join(filter(None, (chosen, f"{EXPANDABLE}:{value}"))) for value in (True, False))
        _configure(on)
        try:
            torch.empty(2**26, dtype=torch.uint8, device=self._device)
        except RuntimeError:  # a driver or container without virtual memory management
            _configure(off)
            return False
        self._shrink = _at_the_end(self, functools.partial(_configure, off))
        return True

    def restore(self) -> None:
        """Give back what was there before."""
        for undo in (self._unlimit, self._shrink):
            if undo is not None:
                undo()
        self._unlimit = self._shrink = self._expands = None


def _at_the_end(owner: Allocator, undo: functools.partial[None]) -> weakref.finalize[..., Allocator]:
    """``undo`` for a model that is dropped and not undone."""
    made = weakref.finalize(owner, undo)
    made.atexit = False
    return made


__all__ = ["EXPANDABLE", "Allocator"]
