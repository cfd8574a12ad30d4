"""The weights of ``fastplug.layers.QuantLinear``, whatever format they are encoded in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastplug.ops.table import OpTable
from fastplug.quant.codec import Damaged, EncodedWeight
from fastplug.quant.incomplete import sharded
from fastplug.sharding import own_class


class QuantLinearWeights:
    name = "quant-linear"

    def matches(self, linear: nn.Module) -> bool:
        kind = own_class(type(linear))
        return kind.__module__ == "fastplug.layers.linear" and kind.__qualname__ == "QuantLinear"

    def read(self, linear: nn.Module) -> EncodedWeight | str:
        layer: Any = linear
        found: EncodedWeight | str = layer.read()
        if isinstance(found, str) and not sharded(layer) and all(getattr(layer, part).numel() for part in layer.parts):
            return Damaged("its encoded weight has parts of other sizes than those it was made with")
        return found

    def problems(self, weight: EncodedWeight, linear: nn.Module) -> Iterator[tuple[torch.Tensor, str]]:
        """What the format of the weight finds wrong with it: see :class:`fastplug.quant.codec.Codec`."""
        format_of: Any = weight.codec
        if hasattr(format_of, "problems"):
            yield from format_of.problems(weight, linear)

    def compute_dtype(self, linear: nn.Module, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def dense(self, weight: EncodedWeight, dtype: torch.dtype) -> torch.Tensor | None:
        return weight.codec.dense(weight, dtype)

    def decode(self, weight: EncodedWeight, out: torch.Tensor, ops: OpTable, row_start: int = 0) -> None:
        weight.codec.decode(weight, out, ops, row_start)
