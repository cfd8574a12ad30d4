"""Weights as bitsandbytes stores them in safetensors files: reading them, and writing them.

Beside the packed bytes ``weight`` [(n + 1) / 2, 1] uint8 lie ``weight.absmax``, ``weight.quant_map``, with double
quantization ``weight.nested_absmax`` and ``weight.nested_quant_map``, and ``weight.quant_state.bitsandbytes__nf4`` (or
``fp4``): the bytes of a JSON text with the shape, the dtype, the block sizes and the nested offset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastplug.errors import ModelError
from fastplug.layers.linear import QuantLinear
from fastplug.layers.reading import Reader, Stored
from fastplug.ops.quantize_4bit import codes
from fastplug.quant.bnb4 import PARTS, BitsAndBytes4, odd, sizes
from fastplug.quant.codec import EncodedWeight

STATE = "quant_state.bitsandbytes__"
_STATE_BYTES = 384  # of the JSON text, padded with spaces: its length depends on the values


_PARTS = ("absmax", "quant_map", "nested_quant_map", "nested_absmax")


@dataclass(frozen=True, eq=False)
class StoredWeight4Bit:
    """A 4-bit weight in the files: its name, and the names of its parts by what they are."""

    name: str
    parts: dict[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Its tensors, in the order in which they are read."""
        return (self.parts["state"], self.name, *(self.parts[part] for part in _PARTS if part in self.parts))

    def read(self, reader: Reader, given: Mapping[str, Stored]) -> EncodedWeight:
        """The encoded weight on the reader's device. Raises :class:`ModelError` where its parts do not fit together."""
        state = self._state(reader, given)
        try:
            shape = (int(state["shape"][0]), int(state["shape"][1]))
            blocksize = int(state["blocksize"])
            nested_blocksize = int(state.get("nested_blocksize", codes.NESTED_BLOCKSIZE))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._wrong(f"its state has no usable {error}") from error
        names = _PARTS if "nested_absmax" in self.parts else _PARTS[:2]
        if missing := [name for name in names if name not in self.parts]:
            raise self._wrong(f"{missing[0]} is missing")
        packed = reader.read(given[self.name])
        found = [reader.read(given[self.parts[name]]) for name in names]
        self._check(packed, found, shape, blocksize, nested_blocksize)
        layout: tuple[int, ...] = (blocksize,)
        tensors = [packed.view(torch.uint8).flatten(), *found]
        if len(found) > 2:
            try:
                offset = float(state["nested_offset"])
            except (KeyError, TypeError, ValueError) as error:
                raise self._wrong("its state has no nested_offset") from error
            if not math.isfinite(offset):
                raise self._wrong(f"its nested_offset is {offset}")
            tensors.append(torch.tensor(offset, dtype=torch.float32, device=reader.device))
            layout = (blocksize, nested_blocksize)
        return EncodedWeight(BitsAndBytes4(), tuple(tensors), shape, layout)

    def _state(self, reader: Reader, given: Mapping[str, Stored]) -> dict[str, Any]:
        try:
            return dict(json.loads(bytes(reader.read(given[self.parts["state"]]).cpu().tolist())))
        except ValueError as error:
            raise self._wrong(f"its state is not JSON ({error})") from error

    def _check(
        self, packed: torch.Tensor, found: list[torch.Tensor], shape: tuple[int, int], blocksize: int, nested: int
    ) -> None:
        if blocksize not in codes.BLOCKSIZES:
            raise self._wrong(odd(blocksize))
        if nested < 1:
            raise self._wrong(f"its nested_blocksize is {nested}")
        actual_sizes = (packed.numel() * packed.element_size(), *(tensor.numel() for tensor in found))
        needed = sizes(shape, blocksize, nested if len(found) > 2 else None)
        for name, actual, expected in zip(PARTS, actual_sizes, needed):
            if expected != actual:
                raise self._wrong(f"{name} holds {actual} values, and {shape[0]}x{shape[1]} needs {expected}")
        for tensor in found:
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise self._wrong("its scales hold values that are not finite")

    def _wrong(self, reason: str) -> ModelError:
        return ModelError(f"fastplug.layers: the 4-bit weight {self.name} is damaged: {reason}; copy the files again")


def stored_4bit(given: Mapping[str, Stored]) -> dict[str, StoredWeight4Bit]:
    """The 4-bit weights among the tensors of a folder, by name."""
    found = {}
    for name in given:
        base, _, rest = name.partition(f".{STATE}")
        if not rest or base not in given:
            continue
        prefix = f"{base}."
        parts = {other.removeprefix(prefix): other for other in given if other.startswith(prefix) and other != name}
        found[base] = StoredWeight4Bit(base, {**parts, "state": name})
    return found


def tensors(layer: QuantLinear, name: str) -> dict[str, torch.Tensor]:
    """The tensors that bitsandbytes stores for the weight ``name`` of ``layer``, whose codec must be that format's."""
    encoded: Any = layer.read()
    packed, absmax, code, *nested = encoded.tensors
    kind = kind_of(layer)
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": encoded.layout[0],
        "dtype": str(layer.dtype).removeprefix("torch."),
        "shape": list(encoded.shape),
    }
    found = {name: packed.view(-1, 1), f"{name}.absmax": absmax, f"{name}.quant_map": code}
    if nested:
        code2, absmax2, offset = nested
        state |= {
            "nested_blocksize": encoded.layout[1], "nested_dtype": "float32", "nested_offset": float(offset),
        }  # fmt: skip
        found |= {f"{name}.nested_absmax": absmax2, f"{name}.nested_quant_map": code2}
    text = json.dumps(state).encode().ljust(_STATE_BYTES)
    found[f"{name}.{STATE}{kind}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return found


def kind_of(layer: QuantLinear) -> str | None:
    """``nf4`` or ``fp4`` if that is how the weight of ``layer`` is stored, else None."""
    if layer.codec.name != BitsAndBytes4.name:
        return None
    code: torch.Tensor = layer.code  # type: ignore[assignment]
    return next((kind for kind in codes.KINDS if torch.equal(codes.values(kind, code.device), code)), None)
