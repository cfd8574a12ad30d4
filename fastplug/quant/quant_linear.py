"""The weights of ``fastplug.layers.QuantLinear``, whatever format they are encoded in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastplug.ops.table import OpTable
from fastplug.quant.codec import EncodedWeight
from fastplug.sharding import own_class


class QuantLinearWeights:
    name = "quant-linear"

    def matches(self, linear: nn.Module) -> bool:
        kind = own_class(type(linear))
        return kind.__module__ == "fastplug.layers.linear" and kind.__qualname__ == "QuantLinear"

    def read(self, linear: nn.Module) -> EncodedWeight | str:
        layer: Any = linear
        return layer.read()  # type: ignore[no-any-return]

    def compute_dtype(self, linear: nn.Module, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def dense(self, weight: EncodedWeight, dtype: torch.dtype) -> torch.Tensor | None:
        return weight.codec.dense(weight, dtype)

    def decode(self, weight: EncodedWeight, out: torch.Tensor, ops: OpTable, row_start: int = 0) -> None:
        weight.codec.decode(weight, out, ops, row_start)
