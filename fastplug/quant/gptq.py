"""GPTQ weights (Frantar et al. 2022, arXiv:2210.17323) as GPTQModel and AutoGPTQ store them.

Integers of 2, 3, 4 or 8 bits, packed along the input features; scales and zero points for groups of them. With
act-order ("desc_act") ``g_idx`` names the group of every input feature. The first version of the format stores every
zero point less one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastplug.ops.int_weights import Layout
from fastplug.quant.codec import Damaged, EncodedWeight
from fastplug.quant.packed import Packed, integers
from fastplug.quant.versions import of_known_version
from fastplug.sharding import SHARDED, distributed

# Layers that keep their weight as the file has it; other kernels of GPTQModel (Marlin, ExLlama) rearrange it.
CLASSES = ("TorchQuantLinear", "TorchLinear", "TritonV2QuantLinear", "TritonV2Linear")


class GPTQ(Packed):
    name = "gptq"

    def matches(self, linear: nn.Module) -> bool:
        return type(linear).__module__.startswith("gptqmodel.") and hasattr(linear, "g_idx")

    @of_known_version()
    def read(self, linear: nn.Module) -> EncodedWeight | str:
        layer: Any = linear
        if type(layer).__name__ not in CLASSES:
            return f"a {type(layer).__name__} keeps its weight in an order of its own (load it with backend='torch')"
        if getattr(layer, "planar", False) or layer.pack_dtype != torch.int32:
            return "its codes are packed in planes or not in 32-bit words"
        if getattr(layer, "adapter", None) is not None:
            return "has an adapter of GPTQModel"
        if getattr(layer, "had_K", None) is not None or getattr(layer, "online_full_had", False):
            return "rotates its input"
        qweight, qzeros, scales, g_idx = layer.qweight, layer.qzeros, layer.scales, layer.g_idx
        if any(distributed(tensor) for tensor in (qweight, qzeros, scales, g_idx)):
            return f"its GPTQ weight {SHARDED}"
        if not g_idx.numel():
            return "it does not say which columns are a group (g_idx)"
        shape = (scales.shape[1], g_idx.shape[0])
        order = g_idx if layer.desc_act else None
        first = layer.qzero_format() == 1
        return gptq(
            self, shape, layer.bits, qweight, qzeros, scales, order, group=layer.group_size, first_version=first
        )

    def problems(self, weight: EncodedWeight, linear: nn.Module) -> Iterator[tuple[torch.Tensor, str]]:
        yield from super().problems(weight, linear)
        g_idx: Any = getattr(linear, "g_idx", None)
        if g_idx is not None and not linear.desc_act:
            expected = torch.arange(len(g_idx), device=g_idx.device) // weight.layout[0].group
            yield (g_idx != expected).any(), "an order of its columns (g_idx), though it was made without (desc_act)"


def gptq(
    codec: Any,
    shape: tuple[int, int],
    bits: int,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    *,
    group: int,
    first_version: bool,
) -> EncodedWeight | str:
    """A GPTQ weight [out_features, in_features], or the reason why these tensors are none.

    Args:
        codec: What decodes it.
        shape: (out_features, in_features).
        bits: Bits of a code.
        qweight: int32 [in_features * bits / 32, out_features].
        qzeros: int32 [groups, out_features * bits / 32].
        scales: fp16 or bf16 [groups, out_features].
        g_idx: int32 [in_features], None where every ``group`` input features in a row are a group.
        group: Input features in a group; -1 for all.
        first_version: Whether zero points are stored less one.
    """
    group = shape[1] if group in (-1, 0) else group
    if g_idx is not None and shape[1] % group:
        return Damaged(f"groups of {group} do not divide {shape[1]} columns, which are in an order of their own")
    layout = Layout(shape, bits, "input", group, packed_zeros=True, zero_plus_one=first_version)
    return integers(codec, layout, qweight, scales.t(), qzeros.t(), g_idx)
