"""Recording launches with CUDA graphs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

import torch


class Memory(NamedTuple):
    """Bytes in tensors, in the allocator's hands altogether, and free: on the device and in its hands."""

    allocated: int
    reserved: int
    free: int


Record = tuple[list[torch.Tensor], Callable[[], None]]


class Recorder(Protocol):
    """Records a function's launches: CUDA graphs, or in tests a stand-in that calls the function again."""

    devices: list[int]  # whose random number generators a warm-up must leave alone

    def record(self, function: Callable[[], list[torch.Tensor]]) -> Record:
        """The function's results, and a call that computes them again in the same tensors."""

    def another(self) -> Recorder:
        """One with memory of its own, which is free once its recordings are gone."""

    def ready(self) -> AbstractContextManager[None]:
        """Where everything that belongs to a recording runs."""

    def memory(self) -> Memory:
        """What is taken and what is free now."""

    def trim(self) -> None:
        """Give back what warming up has left in the allocator's cache, on the recorder's stream."""

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers, which do not keep the memory that they lie in."""


class _At:
    """Bytes of a CUDA device, as the CUDA array interface describes them."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {"data": (pointer, False), "shape": (size,), "typestr": "|u1", "version": 3}


@contextmanager
def _no_collection() -> Iterator[None]:
    """No cycle is collected meanwhile: to free another model's graphs would end a capture that is in progress."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


class CUDARecorder:
    """CUDA graphs, recorded on a stream of their own, that share one memory pool.

    They may share it because nothing but tensors that stay referenced lives from one replay to another.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self.device = device
        self.devices = [device.index or 0]
        self.stream = torch.cuda.Stream(device) if stream is None else stream
        self.pool = torch.cuda.graph_pool_handle()
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._recorded = False

    def another(self) -> Recorder:
        return CUDARecorder(self.device, self.stream)  # cuBLAS has memory for every stream it was used on, for good

    def record(self, function: Callable[[], list[torch.Tensor]]) -> Record:
        if self._recorded and not self._graphs:  # a pool that no graph is left of takes no other
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with _no_collection():
            try:
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    results = function()
                finally:
                    graph.capture_end()
            except BaseException:
                self._leave_capture()
                raise
        self._graphs.add(graph)
        self._recorded = True
        return results, graph.replay

    def _leave_capture(self) -> None:
        """A capture that failed leaves the generator waiting for its end: any dropout from then on is an error."""
        generator = torch.cuda.default_generators[self.devices[0]]
        generator.graphsafe_set_state(generator.clone_state())

    @contextmanager
    def ready(self) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def memory(self) -> Memory:
        allocated, reserved = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        return Memory(allocated, reserved, torch.cuda.mem_get_info(self.device)[0] + reserved - allocated)

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        flat = torch.as_tensor(_At(tensor.data_ptr(), span * tensor.itemsize), device=tensor.device)
        return flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def recorder_for(device: torch.device) -> Recorder | None:
    """CUDA graphs where there are any."""
    return CUDARecorder(device) if device.type == "cuda" and torch.version.hip is None else None
