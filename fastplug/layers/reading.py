"""Read the tensors of safetensors files one by one, past the page tables.

The library maps whole files into memory: what was read once stays in the process's resident memory until the file is
closed, a second copy of the model. Here a tensor's bytes are read into the memory where they are needed, in parallel,
and for a GPU through a few pinned buffers, so that reading, copying and quantizing overlap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from fastplug.errors import ModelError
from fastplug.exporters.safetensors_stream import DTYPES

_TYPES = {name: dtype for dtype, name in DTYPES.items()}
_CHUNK = 16 << 20  # bytes of one read, and of a pinned buffer
_BUFFERS = 6
_THREADS = 4
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
    if not file.is_file():
        raise ModelError(f"fastplug.layers: there is no file {file}")
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            raise ModelError(f"fastplug.layers: {file} is truncated or no safetensors file; copy it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ModelError(f"fastplug.layers: {file} has a broken header: {error}") from error
    header.pop("__metadata__", None)
    found = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if entry["dtype"] not in _TYPES:
            raise ModelError(f"fastplug.layers: {name} in {file} is {entry['dtype']}, which fastplug does not read")
        dtype, shape = _TYPES[entry["dtype"]], tuple(entry["shape"])
        if last - first != math.prod(shape) * dtype.itemsize or 8 + length + last > size:
            raise ModelError(
                f"fastplug.layers: {file} is truncated: {name} ends beyond its {size} bytes; copy it again"
            )
        found[name] = Stored(file, 8 + length + first, last - first, dtype, shape)
    return found


class Reader:
    """Reads tensors onto ``device``. A context manager: it holds threads and, for a GPU, pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[torch.Tensor] = []
        self._events: list[Any] = []

    def __enter__(self) -> Reader:
        self._pool = ThreadPoolExecutor(_THREADS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        self._buffers.clear()

    def read(self, stored: Stored) -> torch.Tensor:
        """The tensor, on the device. Raises :class:`ModelError` where the file ends too early."""
        out = torch.empty(stored.shape, dtype=stored.dtype, device=self.device)
        if not stored.size:
            return out
        flat = out.view(-1).view(torch.uint8)
        if self.device.type == "cpu":
            jobs = [self._submit(stored, part, flat[part.start : part.stop]) for part in _parts(stored.size)]
            for job in jobs:
                job.result()
        else:
            self._through_buffers(stored, flat)
        return out

    def _through_buffers(self, stored: Stored, flat: torch.Tensor) -> None:
        if not self._buffers:
            pinned = self.device.type == "cuda"
            self._buffers = [torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=pinned) for _ in range(_BUFFERS)]
            self._events = [None] * _BUFFERS
        parts = list(_parts(stored.size))
        jobs: list[Future[None]] = []
        for i, part in enumerate(parts):
            for ahead in range(len(jobs), min(i + _BUFFERS, len(parts))):
                slot = ahead % _BUFFERS
                if self._events[slot] is not None:
                    self._events[slot].synchronize()  # its last copy to the device is done
                following = parts[ahead]
                jobs.append(self._submit(stored, following, self._buffers[slot][: following.stop - following.start]))
            jobs[i].result()
            slot = i % _BUFFERS
            target = flat[part.start : part.stop]
            target.copy_(self._buffers[slot][: len(target)], non_blocking=self.device.type == "cuda")
            if self.device.type == "cuda":
                self._events[slot] = torch.cuda.Event()
                self._events[slot].record(torch.cuda.current_stream(self.device))

    def _submit(self, stored: Stored, part: slice, target: torch.Tensor) -> Future[None]:
        return self._pool.submit(_fill, stored, part.start, target)


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
