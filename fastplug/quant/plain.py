"""Dense weights of ``torch.nn.Linear`` in bf16, fp16, fp32 or fp64."""

from __future__ import annotations

import torch
from torch import nn

from fastplug.ops.table import OpTable
from fastplug.quant.codec import EncodedWeight
from fastplug.sharding import SHARDED, distributed, own_class, whole

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Plain:
    name = "plain"

    def matches(self, linear: nn.Module) -> bool:
        kind = own_class(type(linear))
        return kind is nn.Linear or kind.__qualname__ == "FalconLinear"  # which adds its bias in a second step

    def read(self, linear: nn.Module) -> EncodedWeight | str:
        weight = getattr(linear, "weight", None)
        if weight is None:
            return "it has no weight"
        if distributed(weight):
            return f"its weight {SHARDED}"
        if type(weight) is not nn.Parameter and type(weight) is not torch.Tensor:
            return f"its weight is a {type(weight).__name__}"
        if weight.dtype not in FLOATS:
            return f"its weight has dtype {weight.dtype}"
        if not whole(weight, 2):
            return f"its weight {SHARDED}"
        return EncodedWeight(self, (weight,), (weight.shape[0], weight.shape[1]))

    def compute_dtype(self, linear: nn.Module, dtype: torch.dtype) -> torch.dtype:
        return linear.weight.dtype  # type: ignore[return-value]

    def dense(self, weight: EncodedWeight, dtype: torch.dtype) -> torch.Tensor | None:
        return weight.tensors[0].detach().to(dtype)

    def decode(self, weight: EncodedWeight, out: torch.Tensor, ops: OpTable, row_start: int = 0) -> None:
        out.copy_(weight.tensors[0].detach()[row_start : row_start + len(out)])
