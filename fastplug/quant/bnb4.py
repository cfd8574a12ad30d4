"""bitsandbytes 4-bit weights (NF4 and FP4), with and without double quantization.

Two values lie in each byte, the high nibble first; ``code[value] * absmax[block]`` is the weight. With double
quantization absmax itself is stored in 8 bits: ``code2[absmax] * absmax2[block2] + offset`` (Dettmers et al. 2023,
QLoRA, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastplug.ops.table import OpTable
from fastplug.quant.codec import EncodedWeight
from fastplug.sharding import SHARDED, distributed


class BitsAndBytes4:
    name = "bitsandbytes-4bit"

    def matches(self, linear: nn.Module) -> bool:
        return type(linear).__module__ == "bitsandbytes.nn.modules" and type(linear).__name__ == "Linear4bit"

    def read(self, linear: nn.Module) -> EncodedWeight | str:
        weight: Any = linear.weight
        state = getattr(weight, "quant_state", None) or getattr(linear, "quant_state", None)
        if state is None:
            return "its 4-bit weight is not quantized yet (move the model to its device first)"
        if distributed(weight):
            return f"its 4-bit weight {SHARDED}"
        if getattr(state, "packing_format_for_cpu", False):
            state = _unpack(weight, state)
        shape = tuple(state.shape)
        if len(shape) != 2:
            return f"its 4-bit weight has shape {shape}, not two dimensions"
        packed = weight.detach()
        packed = packed if packed.dtype == torch.uint8 else packed.view(torch.uint8)
        if packed.numel() != (shape[0] * shape[1] + 1) // 2:
            return f"its 4-bit weight {SHARDED}"
        if state.nested:
            inner = state.state2
            tensors = (packed, state.absmax, state.code, inner.code, inner.absmax, state.offset)
            return EncodedWeight(self, tensors, shape, (state.blocksize, inner.blocksize))
        return EncodedWeight(self, (packed, state.absmax, state.code), shape, (state.blocksize,))

    def compute_dtype(self, linear: nn.Module, dtype: torch.dtype) -> torch.dtype | str:
        if (
            not torch.is_grad_enabled()
            and not linear.training
            and linear.weight.device.type == "cpu"
            and getattr(linear, "support_avx512bf16_for_cpu", False)
        ):  # taking turns with it would repack the weights every time
            return "rests on 4-bit weights that bitsandbytes evaluates on this CPU with a packing of its own"
        return getattr(linear, "compute_dtype", None) or dtype

    def dense(self, weight: EncodedWeight, dtype: torch.dtype) -> torch.Tensor | None:
        return None

    def decode(self, weight: EncodedWeight, out: torch.Tensor, ops: OpTable, row_start: int = 0) -> None:
        packed, absmax, code, *nested = weight.tensors
        ops.nf4.decode(
            packed,
            absmax,
            code,
            weight.layout[0],
            out,
            nested=(*nested, weight.layout[1]) if nested else None,
            row_start=row_start,
        )


def _unpack(weight: Any, state: Any) -> Any:
    """Undo the layout into which bitsandbytes repacks a weight at its first evaluation on a CPU with AVX512-bf16.

    There the scales are plain bfloat16. bitsandbytes' own inverse leaves them so, in a layout that its decoding cannot
    read, or quantizes them again, a little further off at every turn between training and evaluation. As fp32 they
    keep their values.
    """
    from bitsandbytes.nn.modules import _convert_weight_packed_for_cpu_inverse

    state.original_nested = False
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    weight.quant_state.absmax = weight.quant_state.absmax.t().reshape(-1).float()
    return weight.quant_state
