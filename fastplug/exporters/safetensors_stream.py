"""A safetensors writer that holds one tensor at a time, while the next one is computed.

The format (https://github.com/huggingface/safetensors, "Format"): eight bytes with the length N of the header, little
endian; N bytes of JSON that map each name to its dtype, shape and byte range behind the header; the bytes. So the
header follows from shapes alone, and tensors can be computed, appended and forgotten one by one. The library's own
``save_file`` wants all tensors of a file in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastplug.exporters.api import ExportError

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def file_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The library's order within a file: wider dtypes first, so that every tensor is aligned, then by name."""
    return sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))


class SafetensorsWriter:
    """Write one safetensors file, tensor by tensor.

    Args:
        path: The file; it must not exist.
        specs: All tensors of the file, in the order in which they lie there (see :func:`file_order`).
        metadata: Text for ``__metadata__``; transformers wants ``{"format": "pt"}``.
        ordered: Whether they are written in that order too. Otherwise each goes to its place, and the file is read
            once more at the end for its digest.

    Leaving the ``with`` block checks that every tensor was written. ``sha256`` is the digest of the file, computed
    from what was written and not from what the disk made of it.
    """

    def __init__(
        self,
        path: Path,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str] | None = None,
        *,
        ordered: bool = True,
    ) -> None:
        self.path = path
        self._ordered = ordered
        self._pending = {spec.name: spec for spec in specs}
        self._header = _header(specs, metadata or {"format": "pt"})
        self._places: dict[str, int] = {}
        place = len(self._header)
        for spec in specs:
            self._places[spec.name] = place
            place += spec.nbytes
        self._specs = tuple(specs)
        self._hash = hashlib.sha256()
        self._parts: dict[str, bytes] = {}
        self.sha256 = ""

    def __enter__(self) -> SafetensorsWriter:
        self._file = open(self.path, "x+b", buffering=0)
        self._workers = ThreadPoolExecutor(2)  # both release the GIL, so the next tensor is computed meanwhile
        self._running: list[Future[Any]] = []
        _write_all(self._file, memoryview(self._header), 0)
        self._hash.update(self._header)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write ``tensor`` (any device, any strides), whose name, shape and dtype must be a spec's, if ``ordered`` the
        next one's.

        It is written while the caller goes on, so do not change it before the ``with`` block is left. An error of the
        disk is raised by the next call or at the end of the block.
        """
        expected = next(iter(self._pending), None) if self._ordered else name
        spec = self._pending.pop(expected, None) if expected is not None else None
        if spec is None or (spec.name, spec.shape, spec.dtype) != (name, tuple(tensor.shape), tensor.dtype):
            raise ExportError(
                f"fastplug: {name} came out as {tuple(tensor.shape)} {tensor.dtype}, but {spec} was planned; this is "
                "an error in fastplug, please report it with the model's name"
            )
        if tensor.numel():
            flat = tensor.detach().contiguous().cpu().reshape(-1)
            values: Any = flat.view(torch.uint8).numpy()
            data = memoryview(values)
            self._finish()
            hashing = self._hash.update if self._ordered else partial(self._hash_part, name)
            self._running = [
                self._workers.submit(_write_all, self._file, data, self._places[name]),
                self._workers.submit(hashing, data),
            ]

    def _hash_part(self, name: str, data: memoryview) -> None:
        self._parts[name] = hashlib.sha256(data).digest()

    def _finish(self) -> None:
        running, self._running = self._running, []
        for job in running:
            job.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
                if not self._ordered and not self._pending:
                    self._hash_file()
        finally:
            self._workers.shutdown()
            self._file.close()
        if kind is None and self._pending:
            raise ExportError(f"fastplug: {self.path.name} lacks {len(self._pending)} planned tensors")
        self.sha256 = self._hash.hexdigest()

    def _hash_file(self) -> None:
        self._file.seek(len(self._header))
        for spec in self._specs:
            part, left = hashlib.sha256(), spec.nbytes
            while left:
                block = self._file.read(min(left, 1 << 22))
                if not block:
                    break
                part.update(block)
                self._hash.update(block)
                left -= len(block)
            if spec.nbytes and part.digest() != self._parts[spec.name]:
                raise ExportError(
                    f"fastplug: {spec.name} does not read back as it was written; the disk may be failing"
                )


def _write_all(file: Any, data: memoryview, place: int) -> None:
    """Write at ``place``; a raw file may take less than it is given, and no more than 2 GiB at once."""
    file.seek(place)
    while len(data):
        data = data[file.write(data[: 1 << 28]) :]


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for spec in specs:
        if spec.dtype not in DTYPES:
            raise ExportError(f"fastplug: {spec.name} is {spec.dtype}, which the safetensors writer does not know")
        header[spec.name] = {
            "dtype": DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text
