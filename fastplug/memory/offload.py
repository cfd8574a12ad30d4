"""Tensors that wait for the backward in host memory.

A tensor is copied out on a stream of its own while its layer runs, and its memory on the device is given up when the
next layer but one begins; by then the copy is done, or the device waits for it. In the backward the tensors of one
layer are copied back while the layer after it runs. So two layers' tensors are on the device at a time (double
buffering), and copies and computation overlap. The copies are of bytes: exact for every dtype.

No memory is ever given up while a copy may still use it: device memory is freed after the computing stream has been
made to wait for the copy's event, and pieces of host memory are used again by later copies on the same stream only.
"""

from __future__ import annotations

import statistics
import weakref
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastplug.memory.host_memory import PIECE, HostPool, check_host_memory

SMALLEST = 2**20  # bytes below which a tensor stays on the device: it would take a whole piece of the host's memory
# A layout stays as it is, expanded and padded ones too, if copying its gaps adds no more than this factor: attention's
# backward wants the padded rows of a mask that its forward saved.
MOST_HOLES = 1.25
# A view goes with the whole memory it looks into if that is no more than this factor larger: q, k and v lie in one
# buffer and are saved one by one.
LARGEST_WHOLE = 2
TIMED, ENOUGH = 256, 8  # copies that wait for the device to have timed them, and those that tell how fast they are
LATEST = 64  # copies of a direction that count
TIMED_SIZE = 2 * PIECE  # bytes of those that are timed: the latency of small ones would be most of it


def address(tensor: torch.Tensor) -> int:
    """Where the memory of a tensor lies, or 0 if it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # subclasses that wrap other tensors
        return 0


class Handle:
    """The bytes of one tensor: on the device, on the host, or both."""

    def __init__(self, pool: HostPool, on_device: torch.Tensor, pieces: list[torch.Tensor]) -> None:
        self.size = on_device.numel()  # bytes
        self.on_device: torch.Tensor | None = on_device  # uint8 [size]
        self.pieces = pieces
        self.event: torch.cuda.Event | None = None  # of the latest copy
        self.owner: torch.cuda.Stream | None = None  # the stream whose memory that copy writes, if it copies in
        self._pool = pool

    def copy(self, out: bool) -> None:
        """Copy all bytes on the current stream, ``out`` to the host or in from there."""
        assert self.on_device is not None
        for piece, part in zip(self.pieces, self.on_device.split(PIECE)):
            here = piece[: len(part)]
            target, source = (here, part) if out else (part, here)
            target.copy_(source, non_blocking=True)

    def __del__(self) -> None:
        """A graph may be dropped while its tensors are still being copied in: their memory must not go before."""
        if self.event is not None and self.owner is not None:
            self.owner.wait_event(self.event)
        self._pool.give(self.pieces)


@dataclass(frozen=True)
class Packed:
    """What a group gives for a tensor: the bytes it lies in, and how they are to be seen."""

    handle: Handle
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int = 0  # elements


class Group:
    """The offloaded tensors of one run of one layer. They live as long as what was packed is held.

    Args:
        offloader: What copies.
        skip: Addresses of storages that stay where they are.
    """

    def __init__(self, offloader: Offloader, skip: Collection[int] = ()) -> None:
        self._offloader, self._skip = offloader, skip
        self._known: dict[tuple[int, int], weakref.ref[Handle]] = {}  # by address and size in bytes

    @property
    def handles(self) -> list[Handle]:
        """What has not been given up yet, in the order of the forward."""
        found = (reference() for reference in self._known.values())
        return [handle for handle in found if handle is not None]

    def pack(self, tensor: torch.Tensor) -> Packed | torch.Tensor:
        """Offload a tensor; small ones, and those of other devices, stay what they are. For ``saved_tensors_hooks``."""
        tensor = tensor.detach()
        if tensor.device != self._offloader.device or tensor.numel() * tensor.itemsize < SMALLEST:
            return tensor
        if address(tensor) in self._skip:
            return tensor
        size, stride, offset = tensor.size(), tensor.stride(), 0
        span: int = 1 + sum((n - 1) * step for n, step in zip(size, stride))  # elements from the first to the last
        if span > MOST_HOLES * tensor.numel():
            storage = tensor.untyped_storage()
            whole = int(storage.nbytes()) // tensor.itemsize
            if whole <= LARGEST_WHOLE * tensor.numel() or self._handle((storage.data_ptr(), storage.nbytes())):
                span, offset = whole, int(tensor.storage_offset())
                tensor = tensor.as_strided((span,), (1,), 0)
            else:
                tensor = tensor.contiguous()
                span, stride = tensor.numel(), tensor.stride()
        key = tensor.data_ptr(), span * tensor.itemsize
        handle = self._handle(key)
        if handle is None:
            handle = self._offloader.copy_out(tensor.as_strided((span,), (1,)))
            self._known.pop(key, None)
            self._known[key] = weakref.ref(handle)
        return Packed(handle, tensor.dtype, size, stride, offset)

    def _handle(self, key: tuple[int, int]) -> Handle | None:
        """What has these bytes already; an address is used again once its memory was given up."""
        reference = self._known.get(key)
        handle = None if reference is None else reference()
        return None if handle is None or handle.on_device is None else handle

    def unpack(self, packed: Packed | torch.Tensor) -> torch.Tensor:
        """The tensor on the device again; the layer that comes next in the backward is copied in meanwhile."""
        if isinstance(packed, torch.Tensor):
            return packed
        self._offloader.enter(self)
        self._offloader.copy_in(packed.handle)
        self._offloader.wait(packed.handle)
        data = packed.handle.on_device
        assert data is not None
        return data.view(packed.dtype).as_strided(packed.size, packed.stride, packed.offset)

    def enter(self) -> None:
        """Begin to copy back what is not on the device, what the forward saved last first."""
        self._offloader.copy_in(*reversed(self.handles))

    def leave(self) -> None:
        """Give up the device memory."""
        for handle in self.handles:
            if handle.on_device is not None:
                self._offloader.wait(handle)
                handle.on_device = None


class Timed(NamedTuple):
    """A copy between two events: its direction and bytes."""

    out: bool
    size: int
    begun: torch.cuda.Event
    done: torch.cuda.Event


class Offloader:
    """Moves tensors of one device to the host and back.

    Args:
        device: On a CUDA device the host's memory is pinned and copies run beside the computation; elsewhere they are
            plain copies.

    Attributes:
        timing: Whether copies are timed, for :meth:`rate`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.timing = False
        self._timed: deque[Timed] = deque(maxlen=TIMED)
        self._rates: dict[bool, deque[float]] = {out: deque(maxlen=LATEST) for out in (True, False)}
        self.pool = HostPool(pinned=device.type == "cuda")
        self._stream: torch.cuda.Stream | None = None
        self._groups: list[weakref.ref[Group]] = []
        self._entered: weakref.ref[Group] | None = None  # the layer whose backward began last

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that are held for offloading, in use or not."""
        return self.pool.pieces * PIECE

    @property
    def staged(self) -> int:
        """Bytes on the device that wait there to be copied out, or are back for a backward."""
        groups = self._alive()
        return sum(handle.size for group in groups for handle in group.handles if handle.on_device is not None)

    def group(self, skip: Collection[int] = ()) -> Group:
        """For a layer whose forward begins now.

        Args:
            skip: Addresses of storages that stay where they are.
        """
        self.passed()
        made = Group(self, skip)
        self._groups = [*self._groups, weakref.ref(made)]
        return made

    def passed(self) -> None:
        """A layer's forward begins, whatever its policy: what was offloaded before the last time leaves the device."""
        alive = self._alive()
        self._groups = [weakref.ref(group) for group in alive]
        for group in alive[:-1]:
            group.leave()

    def clear(self) -> int:
        """Let everything leave the device that is waiting there; the bytes that frees."""
        staged = self.staged
        for group in self._alive():
            group.leave()
        self._entered = None
        return staged

    @property
    def latest(self) -> Group:
        """The group of the layer whose forward began last."""
        return self._alive()[-1]

    def enter(self, group: Group) -> None:
        """A tensor of a layer is asked for: bring in all of the layer, then the one before it; all others leave."""
        if self._entered is not None and self._entered() is group:
            return
        self._entered = weakref.ref(group)
        alive = self._alive()
        place = alive.index(group)
        for i, other in enumerate(alive):
            if i not in (place, place - 1):
                other.leave()
        group.enter()
        if place > 0:
            alive[place - 1].enter()

    def copy_out(self, tensor: torch.Tensor) -> Handle:
        """Begin to copy a tensor of one dimension to the host; the handle keeps it on the device for now."""
        flat = tensor.view(torch.uint8)
        handle = Handle(self.pool, flat, self.pool.take(flat.numel()))
        self._copy([handle], out=True)
        return handle

    def copy_in(self, *handles: Handle) -> None:
        """Begin to copy back what is not on the device, in this order."""
        away = [handle for handle in handles if handle.on_device is None]
        for handle in away:
            handle.on_device = torch.empty(handle.size, dtype=torch.uint8, device=self.device)
            handle.owner = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        if away:
            self._copy(away, out=False)

    def rate(self) -> float | None:
        """10^9 bytes a second of the timed copies that are done, in the slower direction; None while there are few.

        Beside the computation, and beside whatever else uses the bus and the host's memory, that is less than what a
        copy reaches alone. Does not wait.
        """
        while self._timed and self._timed[0].done.query():
            out, size, begun, done = self._timed.popleft()
            self._rates[out].append(size / (1e6 * max(begun.elapsed_time(done), 1e-6)))
        medians = [statistics.median(found) for found in self._rates.values() if len(found) >= ENOUGH]
        return min(medians, default=None)

    def wait(self, handle: Handle) -> None:
        """Let the computing stream wait for the latest copy of a handle."""
        if handle.event is not None:
            torch.cuda.current_stream(self.device).wait_event(handle.event)

    def _copy(self, handles: Sequence[Handle], out: bool) -> None:
        if self.device.type != "cuda":
            for handle in handles:
                handle.copy(out)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        # What is copied out has been computed, and what a copy in overwrites is no longer read, when this wait is over.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for handle in handles:
                timed = self.timing and handle.size >= TIMED_SIZE
                begun = self._stream.record_event(torch.cuda.Event(enable_timing=True)) if timed else None
                handle.copy(out)
                handle.event = self._stream.record_event(torch.cuda.Event(enable_timing=timed))
                if begun is not None:
                    self._timed.append(Timed(out, handle.size, begun, handle.event))

    def _alive(self) -> list[Group]:
        groups = [reference() for reference in self._groups]
        return [group for group in groups if group is not None]


__all__ = ["Group", "Offloader", "Packed", "check_host_memory"]
