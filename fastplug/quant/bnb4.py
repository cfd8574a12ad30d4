"""bitsandbytes 4-bit weights (NF4 and FP4), with and without double quantization.

Two values lie in each byte, the high nibble first; ``code[value] * absmax[block]`` is the weight. With double
quantization absmax itself is stored in 8 bits: ``code2[absmax] * absmax2[block2] + offset`` (Dettmers et al. 2023,
QLoRA, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fastplug.ops.nf4.reference import Stored
from fastplug.ops.quantize_4bit.codes import BLOCKSIZES
from fastplug.ops.table import OpTable
from fastplug.quant.codec import Damaged, EncodedWeight
from fastplug.quant.incomplete import incomplete
from fastplug.quant.versions import of_known_version, unknown
from fastplug.sharding import SHARDED, distributed

# The tensors of a weight as files call them: the first three, or with double quantization all.
PARTS = ("weight", "absmax", "quant_map", "nested_quant_map", "nested_absmax", "nested_offset")
BYTES, FLOATS = torch.uint8, torch.float32


class BitsAndBytes4:
    name = "bitsandbytes-4bit"

    def matches(self, linear: nn.Module) -> bool:
        return type(linear).__module__ == "bitsandbytes.nn.modules" and type(linear).__name__ == "Linear4bit"

    @of_known_version("bitsandbytes")
    def read(self, linear: nn.Module) -> EncodedWeight | str:
        weight: Any = linear.weight
        state = getattr(weight, "quant_state", None) or getattr(linear, "quant_state", None)
        if state is None:
            return "its 4-bit weight is not quantized yet (move the model to its device first)"
        if distributed(weight):
            return f"its 4-bit weight {SHARDED}"
        if state.__dict__.get("packing_format_for_cpu"):  # getattr would run QuantState's own, in Python
            state = _unpack(weight, state)
        shape = tuple(state.shape)
        if len(shape) != 2:
            return f"its 4-bit weight has shape {shape}, not two dimensions"
        with torch._C.DisableTorchFunctionSubclass():  # Params4bit runs Python at every use of it
            packed = weight.detach()
        packed = packed if packed.dtype == torch.uint8 else packed.view(torch.uint8)
        bytes_needed = (shape[0] * shape[1] + 1) // 2
        if packed.numel() != bytes_needed:
            return incomplete(linear, "its 4-bit weight", packed, (bytes_needed, 1))
        blocksize, absmax, code = state.blocksize, state.absmax, state.code
        if blocksize not in BLOCKSIZES:
            return odd(blocksize)
        if not state.nested:
            if absmax.dtype is FLOATS and code.dtype is FLOATS:
                return EncodedWeight(self, (packed, absmax, code), shape, (blocksize,))
            return _other_dtypes(linear, absmax, code)
        inner, offset = state.state2, state.offset
        code2, absmax2, blocksize2 = inner.code, inner.absmax, inner.blocksize
        if absmax.dtype is BYTES and code.dtype is code2.dtype is absmax2.dtype is offset.dtype is FLOATS:
            return EncodedWeight(self, (packed, absmax, code, code2, absmax2, offset), shape, (blocksize, blocksize2))
        return _other_dtypes(linear, absmax, code, code2, absmax2, offset)

    def problems(self, weight: EncodedWeight, linear: nn.Module) -> Iterator[tuple[torch.Tensor, str]]:
        """What is wrong with the sizes and values of ``weight``: see :class:`fastplug.quant.codec.Codec`."""
        mismatch = _mismatch(weight, linear)
        if mismatch is not None:
            yield torch.tensor(True), mismatch
            return
        for part, tensor in zip(PARTS, weight.tensors):
            if tensor.is_floating_point():
                yield ~tensor.isfinite().all(), f"scales that are NaN or infinite ({part})"

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
        stored = _stored(weight)
        ops.nf4.decode(
            stored.packed,
            stored.absmax,
            stored.code,
            weight.layout[0],
            out,
            nested=stored.nested,
            row_start=row_start,
        )

    def decode_all(self, weights: Sequence[EncodedWeight], out: torch.Tensor, ops: OpTable) -> bool:
        """See :class:`fastplug.quant.codec.Codec`."""
        together = getattr(ops.nf4, "decode_all", None)
        if together is None:
            return False
        return bool(together([_stored(weight) for weight in weights], weights[0].layout[0], out))


def _stored(weight: EncodedWeight) -> Stored:
    packed, absmax, code, *nested = weight.tensors
    outer = (nested[0], nested[1], nested[2], weight.layout[1]) if nested else None
    return Stored(packed, absmax, code, outer, weight.shape[0])


def _mismatch(weight: EncodedWeight, linear: nn.Module) -> str | None:
    """What parts a weight has that contradict each other, or None."""
    layer: Any = linear
    shape = (layer.out_features, layer.in_features)
    if weight.shape != shape:
        return f"the shape {weight.shape} in a layer of {shape}"
    for blocksize in weight.layout:
        if not isinstance(blocksize, int) or blocksize < 1:
            return f"blocks of {blocksize} values"
    for part, tensor, size in zip(PARTS, weight.tensors, sizes(weight.shape, *weight.layout)):
        if tensor.numel() != size or (part != "weight" and tensor.dim() > 1):
            return f"{part} of shape {tuple(tensor.shape)} where its own shape and blocks need {size} values"
    return None


def _other_dtypes(linear: nn.Module, *tensors: torch.Tensor) -> str:
    found = ", ".join(f"{part} {tensor.dtype}" for part, tensor in zip(PARTS[1:], tensors))
    return unknown(linear, f"it holds {found}", "bitsandbytes")


def sizes(shape: tuple[int, int], blocksize: int, nested_blocksize: int | None = None) -> tuple[int, ...]:
    """How many values each of :data:`PARTS` holds for a weight of this shape, in bytes of two values the first."""
    values = shape[0] * shape[1]
    blocks = -(-values // blocksize)
    outer = () if nested_blocksize is None else (256, -(-blocks // nested_blocksize), 1)
    return ((values + 1) // 2, blocks, 16, *outer)


def odd(blocksize: int) -> str:
    """Why a weight in blocks of this size, none of those that are decoded, cannot be read."""
    if blocksize > 0 and not blocksize & (blocksize - 1):
        return f"blocks of {blocksize} values share a scale, not of {BLOCKSIZES[0]} to {BLOCKSIZES[-1]}"
    return Damaged(f"its blocksize is {blocksize}, which is no power of two")


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
