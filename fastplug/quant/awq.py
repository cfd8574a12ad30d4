"""AWQ weights (Lin et al. 2023, arXiv:2306.00978) as AutoAWQ and GPTQModel store them in version "gemm".

4-bit integers, packed along the output features eight to a word and in an order that suits AutoAWQ's kernels; scales
and zero points for groups of input features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastplug.ops.int_weights import Layout
from fastplug.quant.codec import EncodedWeight
from fastplug.quant.packed import Packed, integers
from fastplug.quant.versions import of_known_version
from fastplug.sharding import SHARDED, distributed

# Layers that keep their weight as the file has it; other kernels (Marlin, ExLlama, GEMV) rearrange it.
CLASSES = ("WQLinear_GEMM", "AwqTorchQuantLinear", "AwqTorchLinear", "AwqGEMMQuantLinear", "AwqGEMMLinear")
LIBRARIES = ("awq.modules.linear.", "gptqmodel.nn_modules.qlinear.")


class AWQ(Packed):
    name = "awq"

    def matches(self, linear: nn.Module) -> bool:
        kind = type(linear)
        awq = "awq" in kind.__module__.rpartition(".")[2] or kind.__name__.startswith("WQLinear")
        return kind.__module__.startswith(LIBRARIES) and awq

    @of_known_version()
    def read(self, linear: nn.Module) -> EncodedWeight | str:
        layer: Any = linear
        if type(layer).__name__ not in CLASSES:
            return f"a {type(layer).__name__} keeps its weight in an order of its own (load it with backend='torch')"
        bits = getattr(layer, "w_bit", None) or layer.bits
        if bits != 4:
            return f"its codes have {bits} bits"
        if getattr(layer, "adapter", None) is not None:
            return "has an adapter of GPTQModel"
        if layer.qzeros is None:
            return "it has no zero points"
        if any(distributed(tensor) for tensor in (layer.qweight, layer.qzeros, layer.scales)):
            return f"its AWQ weight {SHARDED}"
        shape = (layer.out_features, layer.in_features)
        return awq(self, shape, layer.qweight, layer.qzeros, layer.scales, group=layer.group_size)


def awq(
    codec: Any,
    shape: tuple[int, int],
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    *,
    group: int,
) -> EncodedWeight | str:
    """An AWQ weight [out_features, in_features], or the reason why these tensors are none.

    Args:
        codec: What decodes it.
        shape: (out_features, in_features).
        qweight: int32 [in_features, out_features / 8].
        qzeros: int32 [groups, out_features / 8].
        scales: fp16 or bf16 [groups, out_features].
        group: Input features in a group; -1 for all.
    """
    group = shape[1] if group in (-1, 0) else group
    return integers(codec, Layout(shape, 4, "output", group, packed_zeros=True), qweight, scales.t(), qzeros.t())
