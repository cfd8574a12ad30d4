"""Read the tensors of safetensors files one by one, past the page tables.

The library maps whole files into memory: what was read once stays in the process's resident memory until the file is
closed, a second copy of the model. Here a tensor's bytes are read into the memory where they are needed, in parallel,
and for a GPU through a few pinned buffers that are filled ahead, so that reading, copying and quantizing overlap.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from fastplug.errors import ModelError
from fastplug.exporters.safetensors_stream import DTYPES

_TYPES = {name: dtype for dtype, name in DTYPES.items()}
if hasattr(torch, "float8_e8m0fnu"):  # scales of MX formats
    _TYPES["F8_E8M0"] = torch.float8_e8m0fnu
_CHUNK = 16 << 20  # bytes of one read, and of a pinned buffer
_BUFFERS = 8
_THREADS = 6
_LARGEST_HEADER = 100 << 20  # the format's own limit


class Stored(NamedTuple):
    """Where a tensor lies: its file, first byte, number of bytes, dtype and shape."""

    file: Path
    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def tensors_of(folder: Path) -> dict[str, Stored]:
    """All tensors of a model folder's safetensors files, in the order in which they lie there.

    Raises:
        ModelError: No such files, one that the index names is missing, or one is truncated or inconsistent.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [folder / name for name in dict.fromkeys(names.values())]
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"fastplug.layers: {index} is not an index of weights: {error}") from error
    else:
        names, files = {}, [folder / "model.safetensors"]
    found: dict[str, Stored] = {}
    for file in files:
        if not file.is_file():
            raise ModelError(
                f"fastplug.layers: {folder} has no {file.name}; only models in safetensors files can be streamed, "
                "others load with from_pretrained, and quantize_() goes on from there"
            )
        found.update(header_of(file))
    if missing := names.keys() - found.keys():
        raise ModelError(f"fastplug.layers: {index.name} names {len(missing)} tensors that no file has: {min(missing)}")
    return found


def header_of(file: Path) -> dict[str, Stored]:
    """The tensors of one file, in order. Raises :class:`ModelError` where it is missing, truncated or inconsistent."""
    header, first_byte = _header(file)
    size = file.stat().st_size
    header.pop("__metadata__", None)
    found = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if entry["dtype"] not in _TYPES:
            raise ModelError(f"fastplug.layers: {name} in {file} is {entry['dtype']}, which fastplug does not read")
        dtype, shape = _TYPES[entry["dtype"]], tuple(entry["shape"])
        if last - first != math.prod(shape) * dtype.itemsize or first_byte + last > size:
            raise ModelError(
                f"fastplug.layers: {file} is truncated: {name} ends beyond its {size} bytes; copy it again"
            )
        found[name] = Stored(file, first_byte + first, last - first, dtype, shape)
    return found


def metadata_of(file: Path) -> dict[str, str]:
    """The texts in a file's header. Raises :class:`ModelError` where it is missing or truncated."""
    return dict(_header(file)[0].get("__metadata__") or {})


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """What a file's header says, and where its data begin."""
    if not file.is_file():
        raise ModelError(f"fastplug.layers: there is no file {file}")
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_LARGEST_HEADER, file.stat().st_size - 8):
            raise ModelError(f"fastplug.layers: {file} is truncated or no safetensors file; copy it again")
        try:
            return dict(json.loads(stream.read(length))), 8 + length
        except ValueError as error:
            raise ModelError(f"fastplug.layers: {file} has a broken header: {error}") from error


class _Begun(NamedTuple):
    """A part of a tensor that a thread reads into a buffer."""

    stored: Stored
    slot: int
    job: Future[None]


class Reader:
    """Reads tensors onto ``device``. A context manager: it holds threads and, for a GPU, pinned memory.

    Args:
        device: Where to.
        order: The tensors that will be read, in that order. For a GPU the buffers are kept full of what comes next,
            across tensors, while the device works on those before. Other tensors can be read too, but nothing is read
            ahead then.
        buffered: Whether bytes go through the buffers. Default: unless ``device`` is the CPU.
    """

    def __init__(self, device: torch.device, order: Iterable[Stored] = (), *, buffered: bool | None = None) -> None:
        self.device = device
        self._buffered = device.type != "cpu" if buffered is None else buffered
        self._order = deque(stored for stored in order if stored.size)
        self._parts: deque[tuple[Stored, slice]] = deque()  # of the tensor that is next to be begun
        self._begun: deque[_Begun] = deque()
        self._buffers: list[torch.Tensor] = []
        self._events: list[Any] = []
        self._free: deque[int] = deque()  # the buffer that was used last comes last

    def __enter__(self) -> Reader:
        self._pool = ThreadPoolExecutor(_THREADS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._begun.clear()
        self._buffers.clear()

    def read(self, stored: Stored) -> torch.Tensor:
        """The tensor, on the device. Raises :class:`ModelError` where the file ends too early."""
        out = torch.empty(stored.shape, dtype=stored.dtype, device=self.device)
        if not stored.size:
            return out
        flat = out.view(-1).view(torch.uint8)
        if self._buffered:
            self._through_buffers(stored, flat)
            return out
        jobs = [self._pool.submit(_fill, stored, p.start, flat[p.start : p.stop]) for p in _parts(stored.size)]
        for job in jobs:
            job.result()
        return out

    def _through_buffers(self, stored: Stored, flat: torch.Tensor) -> None:
        cuda = self.device.type == "cuda"
        if not self._buffers:
            self._buffers = [torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=cuda) for _ in range(_BUFFERS)]
            self._events = [None] * _BUFFERS
            self._free.extend(range(_BUFFERS))
        self._turn_to(stored)
        for part in _parts(stored.size):
            self._read_ahead()
            _, slot, job = self._begun.popleft()
            job.result()
            target = flat[part.start : part.stop]
            target.copy_(self._buffers[slot][: len(target)], non_blocking=cuda)
            if cuda:
                self._events[slot] = torch.cuda.Event()
                self._events[slot].record(torch.cuda.current_stream(self.device))
            self._free.append(slot)
        self._read_ahead()

    def _turn_to(self, stored: Stored) -> None:
        """Make ``stored`` what is read next. What was begun of a tensor that was expected instead is dropped."""
        expected = self._begun[0].stored if self._begun else self._order[0] if self._order else None
        if expected == stored:
            return
        for begun in self._begun:
            begun.job.result()
            self._free.append(begun.slot)
        self._begun.clear()
        self._parts.clear()
        while self._order and self._order[0] != stored and stored in self._order:
            self._order.popleft()
        if not self._order or self._order[0] != stored:
            self._order = deque([stored])

    def _read_ahead(self) -> None:
        while self._free and (self._parts or self._order):
            slot = self._free[0]
            if self._events[slot] is not None:
                if self._begun and not self._events[slot].query():
                    return  # the device still copies from it, and there is something to go on with
                self._events[slot].synchronize()
            if not self._parts:
                following = self._order.popleft()
                self._parts.extend((following, part) for part in _parts(following.size))
            stored, part = self._parts.popleft()
            self._free.popleft()
            target = self._buffers[slot][: part.stop - part.start]
            self._begun.append(_Begun(stored, slot, self._pool.submit(_fill, stored, part.start, target)))


def _parts(size: int) -> Iterator[slice]:
    for start in range(0, size, _CHUNK):
        yield slice(start, min(start + _CHUNK, size))


def _fill(stored: Stored, start: int, target: torch.Tensor) -> None:
    values: Any = target.numpy()
    view = memoryview(values)
    with open(stored.file, "rb", buffering=0) as stream:  # of its own: threads would share its position
        stream.seek(stored.start + start)
        while len(view):
            count = stream.readinto(view)
            if not count:
                raise ModelError(f"fastplug.layers: {stored.file} ends too early; copy it again")
            view = view[count:]
