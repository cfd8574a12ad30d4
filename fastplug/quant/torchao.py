"""torchao's weight-only formats: tensor subclasses over plain tensors, read through ``__tensor_flatten__``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastplug.ops.int_weights import Layout
from fastplug.quant.codec import Damaged, EncodedWeight
from fastplug.quant.fp8 import fp8
from fastplug.quant.packed import Packed, integers
from fastplug.quant.versions import of_known_version, version

# Class -> the plain tensors that it has in the versions of torchao that this reads.
KNOWN = {
    "Int8Tensor": {"qdata", "scale", "zero_point"},
    "IntxUnpackedToInt8Tensor": {"qdata", "scale", "zero_point"},
    "Int4Tensor": {"qdata", "scale", "zero_point"},
    "Float8Tensor": {"qdata", "scale"},
}


class TorchAO(Packed):
    name = "torchao"

    def matches(self, linear: nn.Module) -> bool:
        weight = linear._parameters.get("weight")
        return type(linear) is nn.Linear and weight is not None and type(weight).__module__.startswith("torchao.")

    @of_known_version("torchao")
    def read(self, linear: nn.Module) -> EncodedWeight | str:
        weight: Any = linear.weight
        kind = type(weight).__name__
        if kind not in KNOWN:
            return f"its weight is torchao's {kind}, whose layout is not read here"
        names, attributes = weight.__tensor_flatten__()
        held = {name: getattr(weight, name) for name in names}
        held = {name: tensor for name, tensor in held.items() if tensor is not None}
        if not {"qdata", "scale"} <= held.keys() <= KNOWN[kind]:
            return f"torchao's {kind} holds {', '.join(held)} in version {version('torchao')}, which is not known here"
        if attributes.get("act_quant_kwargs") is not None or attributes.get("activation_quantization") is not None:
            return "torchao quantizes its activations too"
        return torchao(self, kind, tuple(weight.shape), held, attributes.get("block_size"))

    def compute_dtype(self, linear: nn.Module, dtype: torch.dtype) -> torch.dtype | str:
        return linear.weight.dtype  # type: ignore[return-value]


def torchao(
    codec: Any, kind: str, shape: tuple[int, ...], tensors: dict[str, torch.Tensor], block: Any
) -> EncodedWeight | str:
    """A torchao weight from its plain tensors, or the reason why these are none.

    Args:
        codec: What decodes it.
        kind: The class of the tensor, one of :data:`KNOWN`.
        shape: (out_features, in_features).
        tensors: ``qdata``, ``scale`` and, except for floats, ``zero_point``.
        block: (rows, columns) that share a scale.
    """
    if len(shape) != 2 or (kind != "Float8Tensor" and len(block or ()) != 2):
        return f"its weight has shape {shape} in blocks of {block}"
    N, K = shape
    codes, scales, zeros = tensors["qdata"], tensors["scale"], tensors.get("zero_point")
    if kind == "Float8Tensor":
        several = block is not None and 1 < block[1] < K
        return fp8(codec, codes, scales, tuple(block) if several else None)  # type: ignore[arg-type]
    if kind == "Int4Tensor":  # the scaled code plus a zero point of the weight's own scale
        if zeros is None:
            return "it has no zero points"
        layout = Layout((N, K), 4, group=int(block[1]), sign="twos", add_zero=True)
        return integers(codec, layout, codes, scales.t(), zeros.t())
    rows = -(-N // int(block[0]))
    if block[0] != 1 and rows != 1:
        return f"blocks of {block[0]} rows share a scale"
    if scales.numel() % rows or (zeros is not None and zeros.numel() != scales.numel()):
        points = "" if zeros is None else f" and {zeros.numel()} zero points"
        return Damaged(f"{scales.numel()} scales{points} do not fit {N} x {K} in blocks of {tuple(block)}")
    layout = Layout((N, K), 8, group=int(block[1]), sign="twos")
    scales = scales.reshape(rows, -1)
    return integers(codec, layout, codes, scales, None if zeros is None else zeros.reshape(rows, -1))
