"""Matrices of a GGUF file that are only renamed, written row by row: a large embedding is never held in fp32."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastplug.exporters.api import ExportError
from fastplug.exporters.tensors import LazyTensor

_F16 = 1  # its number in libllama
_ROWS = 1 << 22  # weights converted at a time: 16 MiB in fp32


def read(tensor: LazyTensor, ftype: int) -> Tensor:
    """The tensor on the CPU.

    Raises:
        ExportError: The file is F16 (``ftype``) and a value is too large for that.
    """
    values = tensor.read().detach().to("cpu")
    if ftype == _F16 and values.numel() and max(map(abs, map(float, values.aminmax()))) > 65504:
        raise ExportError(
            f"fastplug: {tensor.name} has values that are too large for F16, which other types are made from too; add "
            '"bf16" to types='
        )
    return values


def write_by_rows(writer: Any, plain: Mapping[str, LazyTensor]) -> None:
    """Let the tensors ``plain`` of a GGUF writer, by their names in the file, be converted as they are written."""
    gguf = sys.modules["gguf"]
    for shard in writer.tensors:
        for name, info in shard.items():
            tensor = plain.get(name)
            if tensor is not None and info.dtype.name in ("F32", "F16", "BF16", "Q8_0"):
                info.tensor = _Rows(tensor, info, gguf)


class _Rows:
    """What the GGUF writer needs of an array: its size, and a way into a file."""

    def __init__(self, tensor: LazyTensor, info: Any, gguf: Any) -> None:
        self.nbytes = info.nbytes
        self._tensor, self._type, self._gguf = tensor, info.dtype, gguf

    def tofile(self, stream: Any) -> None:
        values = read(self._tensor, _F16 if self._type.name == "F16" else 0)
        step = max(_ROWS // max(values.shape[1], 1), 1)
        for begin in range(0, len(values), step):
            self._convert(values[begin : begin + step]).tofile(stream)

    def _convert(self, rows: Tensor) -> Any:
        if self._type.name == "BF16":
            return rows.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
        if self._type.name == "F16":
            return rows.to(torch.float16).contiguous().numpy()
        rows = rows.to(torch.float32).contiguous()
        return rows.numpy() if self._type.name == "F32" else self._gguf.quants.quantize(rows.numpy(), self._type)
