"""How much memory a device has, how much of it is in use, and how long its work takes, without waiting for it."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from fastplug.memory.allocator import Allocator
from fastplug.optimizers import UsedGradient

CONTEXT = 512 * 2**20  # of a CUDA process on an H100, where the device itself cannot tell
CONTEXT_MOST = 2**30  # what is measured above this belongs to other processes


class Mark(Protocol):
    """A moment of the device's work."""

    def milliseconds_since(self, earlier: Mark) -> float | None:
        """Time between two moments, or None while the device has not got there. Does not wait."""


class Meter(Protocol):
    """What the planner asks of a device; all sizes are bytes."""

    def total(self) -> int:
        """Memory of the device."""

    def free(self) -> int:
        """What no process uses."""

    def context(self) -> int:
        """What this process uses beside what PyTorch's allocator has reserved: the CUDA context."""

    def reserved(self) -> int:
        """What PyTorch's allocator holds, in use or not."""

    def allocated(self) -> int:
        """What is in tensors."""

    def peak(self) -> tuple[int, int]:
        """The highest (allocated, reserved) since somebody reset the counters, (0, 0) if nobody counts.

        They are never reset here.
        """

    def retries(self) -> int:
        """How often the allocator had to give back cached blocks to serve a request."""

    def mark(self) -> Mark:
        """A moment in the stream of work given to the device so far."""

    def limit(self, size: int) -> None:
        """Make the allocator reserve ``size`` bytes at most."""

    def expand(self) -> bool:
        """Make the allocator put scattered pieces of free memory together where one is needed; whether it does."""

    def restore(self) -> None:
        """Give back the allocator's limit and settings that were there before."""

    def release(self) -> None:
        """Give cached blocks back to the device."""


class _Event:
    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(torch.cuda.current_stream(device))

    def milliseconds_since(self, earlier: Mark) -> float | None:
        assert isinstance(earlier, _Event)
        if not (self.event.query() and earlier.event.query()):
            return None
        return float(earlier.event.elapsed_time(self.event))


class CUDAMeter:
    """A CUDA or ROCm device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._allocator = Allocator(device, self.total())

    def total(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[1])

    def free(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[0])

    def context(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        measured = int(total - free) - self.reserved()
        return measured if 0 < measured <= CONTEXT_MOST else CONTEXT

    def reserved(self) -> int:
        return int(torch.cuda.memory_reserved(self.device))

    def allocated(self) -> int:
        return int(torch.cuda.memory_allocated(self.device))

    def peak(self) -> tuple[int, int]:
        return int(torch.cuda.max_memory_allocated(self.device)), int(torch.cuda.max_memory_reserved(self.device))

    def retries(self) -> int:
        return int(torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0))

    def mark(self) -> Mark:
        return _Event(self.device)

    def limit(self, size: int) -> None:
        self._allocator.limit(size)

    def expand(self) -> bool:
        return self._allocator.expand()

    def restore(self) -> None:
        self._allocator.restore()

    def release(self) -> None:
        torch.cuda.empty_cache()


class _Moment:
    def __init__(self) -> None:
        self.at = time.perf_counter()

    def milliseconds_since(self, earlier: Mark) -> float | None:
        assert isinstance(earlier, _Moment)
        return (self.at - earlier.at) * 1e3


class HostMeter:
    """A CPU, whose allocator keeps no books: what counts are the model's own tensors and their gradients.

    So a budget on a CPU is that of a device with as much memory as the machine has, on which only this model lies.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Callable[[], nn.Module | None] = weakref.ref(model)

    def total(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**36

    def free(self) -> int:
        return self.total() - self.reserved()

    def context(self) -> int:
        return 0

    def reserved(self) -> int:
        return self.allocated()

    def allocated(self) -> int:
        model = self._model()
        tensors = [] if model is None else [*model.parameters(), *model.buffers()]
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        return sum(local_bytes(tensor) for tensor in (*tensors, *gradients))

    def peak(self) -> tuple[int, int]:
        return 0, 0

    def retries(self) -> int:
        return 0

    def mark(self) -> Mark:
        return _Moment()

    def limit(self, size: int) -> None:
        pass

    def expand(self) -> bool:
        return False

    def restore(self) -> None:
        pass

    def release(self) -> None:
        pass


def local_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor that lie in this process: the own part of one that is sharded (a DTensor), all parts of one
    that wraps others (torchao's), none of a gradient that an optimizer has used within the backward."""
    if isinstance(tensor, UsedGradient):
        return 0
    here: torch.Tensor = getattr(tensor, "_local_tensor", tensor)  # to_local() would become part of a graph
    flatten = getattr(here, "__tensor_flatten__", None)
    if flatten is not None and type(here) not in (torch.Tensor, nn.Parameter):
        return sum(local_bytes(getattr(here, name)) for name in flatten()[0])
    return here.numel() * here.element_size()


def meter_for(device: torch.device, model: nn.Module) -> Meter | None:
    """The meter of a device, or None where fastplug cannot read its memory."""
    if device.type == "cuda":
        return CUDAMeter(device)
    return HostMeter(model) if device.type == "cpu" else None


__all__ = ["CUDAMeter", "HostMeter", "Mark", "Meter", "local_bytes", "meter_for"]
