"""Weights of compressed-tensors (vLLM, LLM Compressor): int8, packed integers, FP8, MXFP8, MXFP4, NVFP4.

transformers loads them compressed, and at the first forward the library decompresses the whole model: from then on the
layers are plain ones. Where its hook is removed (docs/quantized-bases.md), they stay compressed and are decoded here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastplug.ops import float_weights, int_weights
from fastplug.quant.codec import Damaged, EncodedWeight
from fastplug.quant.fp8 import VALUES, fp8
from fastplug.quant.packed import Packed, integers, small_floats
from fastplug.quant.versions import of_known_version
from fastplug.sharding import SHARDED, distributed

NAMES = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_g_idx")


class CompressedTensors(Packed):
    name = "compressed-tensors"
    note = (
        "compressed-tensors weights are decoded and multiplied in 16 or 32 bits; activations that the library would "
        "round as well (w8a8, fp8) are not rounded. The library decompresses the model at its first forward unless "
        "model.ct_decompress_hook was removed (docs/quantized-bases.md)"
    )

    def matches(self, linear: nn.Module) -> bool:
        if type(linear) is not nn.Linear or getattr(linear, "quantization_scheme", None) is None:
            return False
        weight = linear._parameters.get("weight")
        return weight is None or weight.dtype == torch.int8 or weight.dtype in VALUES

    @of_known_version("compressed_tensors")
    def read(self, linear: nn.Module) -> EncodedWeight | str:
        stored = {**linear._buffers, **linear._parameters}
        tensors = {name: tensor for name in NAMES if (tensor := stored.get(name)) is not None}
        if any(distributed(tensor) for tensor in tensors.values()):
            return f"its compressed weight {SHARDED}"
        arguments = getattr(getattr(linear, "quantization_scheme", None), "weights", None)
        if arguments is None:
            return "compressed-tensors does not say how its weight is compressed"
        held = {name: tensor.detach() for name, tensor in tensors.items()}
        return compressed(self, held, (linear.out_features, linear.in_features), arguments)  # type: ignore[arg-type]


def compressed(
    codec: Any, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], arguments: Any
) -> EncodedWeight | str:
    """A weight by the names that its tensors have in a file.

    Args:
        codec: What decodes it.
        tensors: ``weight`` or ``weight_packed``, ``weight_scale`` and what else there is.
        shape: (out_features, in_features).
        arguments: compressed-tensors' ``QuantizationArgs``, or the same as a mapping.

    Returns:
        The weight, or the reason why these are none.
    """

    def argument(name: str, default: Any = None) -> Any:
        value = arguments.get(name) if isinstance(arguments, Mapping) else getattr(arguments, name, None)
        value = default if value is None else value
        return getattr(value, "value", value)  # of an enumeration

    bits, kind, strategy = argument("num_bits", 8), argument("type", "int"), argument("strategy")
    group = argument("group_size") or 0
    K = shape[1]
    scales = tensors.get("weight_scale")
    if scales is None:
        return Damaged("its compressed weight has no weight_scale")
    if "weight_g_idx" in tensors:
        return "its columns are in groups of their own (weight_g_idx), which compressed-tensors has given up"
    packed = tensors.get("weight_packed")
    if packed is not None and kind == "float" and bits == 4:
        if (outer := tensors.get("weight_global_scale")) is not None:
            nvfp4 = float_weights.Layout(shape, "e2m1", (1, group), "e4m3", divide=True)
            return small_floats(codec, nvfp4, packed, scales, outer)
        return small_floats(codec, float_weights.Layout(shape, "e2m1", (1, group), "e8m0"), packed, scales)
    weight = tensors.get("weight") if packed is None else packed
    if weight is None:
        return "its compressed weight has neither weight nor weight_packed"
    if packed is None and weight.shape != shape:
        return Damaged(f"its weight has shape {tuple(weight.shape)}, expected {shape}")
    if kind == "float" and bits == 8:
        block = argument("block_structure")
        if isinstance(block, str):
            block = [int(part) for part in block.split("x")]
        return fp8(codec, weight, scales, block or ((1, group) if group > 0 else None))
    if kind != "int":
        return f"it holds {bits}-bit floats"
    group = group if strategy == "group" or group > 0 else K
    scales = scales.reshape(1, 1) if scales.numel() == 1 else scales.reshape(len(scales), -1)
    sign = "twos" if packed is None else "offset"
    zeros = None if argument("symmetric", True) else tensors.get("weight_zero_point")
    packed_zeros = zeros is not None and zeros.dtype == torch.int32
    if zeros is not None and not packed_zeros:
        if zeros.numel() != scales.numel():
            return Damaged(f"there are {zeros.numel()} zero points for {scales.numel()} scales")
        zeros = zeros.reshape(scales.shape)
    layout = int_weights.Layout(  # both code and packed zero point carry the same offset
        shape, bits, group=group, sign="unsigned" if packed_zeros else sign, packed_zeros=packed_zeros
    )
    return integers(codec, layout, weight, scales, zeros)
