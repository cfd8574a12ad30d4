"""FP8 weights as transformers keeps them: fine-grained (blocks, or one scale), FBGEMM's (rows), compressed-tensors'.

The libraries quantize the activations too, and their matrix products run in FP8. Here the weights are decoded and
multiplied in the dtype of the activations: the same weights, without the error of rounding the activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastplug.ops.float_weights import Layout
from fastplug.quant.codec import Damaged, EncodedWeight
from fastplug.quant.incomplete import incomplete
from fastplug.quant.packed import Packed, small_floats
from fastplug.quant.versions import of_known_version
from fastplug.sharding import SHARDED, distributed

VALUES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
CLASSES = {
    ("transformers.integrations.finegrained_fp8", "FP8Linear"),
    ("transformers.integrations.fbgemm_fp8", "FbgemmFp8Linear"),
    ("transformers.integrations.compressed_tensors", "CompressedTensorsFP8Linear"),
}


class FP8(Packed):
    name = "fp8"
    note = (
        "FP8 weights are decoded and multiplied in 16 or 32 bits; their library rounds the activations to 8 bits as "
        "well, so results differ from its own by that rounding"
    )

    def matches(self, linear: nn.Module) -> bool:
        return (type(linear).__module__, type(linear).__name__) in CLASSES

    @of_known_version()
    def read(self, linear: nn.Module) -> EncodedWeight | str:
        weight: Any = linear.weight
        if distributed(weight):
            return f"its FP8 weight {SHARDED}"
        scales: Any = getattr(linear, "weight_scale_inv", None)  # which multiplies, in spite of its name
        scales = getattr(linear, "weight_scale", None) if scales is None else scales
        if scales is None:
            reason = "its FP8 weight has no scales"  # nor has one that the library keeps in 16 bits
            return Damaged(reason) if weight.dtype in VALUES else reason
        shape: Any = (linear.out_features, linear.in_features)
        if weight.shape != shape:
            return incomplete(linear, "its FP8 weight", weight, shape)
        scales = scales.detach()
        if type(linear).__name__ == "CompressedTensorsFP8Linear":
            scales = scales.t()
        return fp8(self, weight.detach(), scales, getattr(linear, "block_size", None))


def fp8(
    codec: Any, weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None = None
) -> EncodedWeight | str:
    """An FP8 weight [N, K] with one scale ([] or [1]), one for each row ([N] or [N, 1]) or for each ``block``.

    Args:
        codec: What decodes it.
        weight: float8_e4m3fn or float8_e5m2.
        scales: fp32, fp16, bf16, or e8m0 (uint8 or PyTorch's type), which multiply.
        block: (rows, columns) of a block, None for one scale or one a row.

    Returns:
        The weight, or the reason why these are none.
    """
    value = VALUES.get(weight.dtype)
    if value is None:
        return f"its weight has dtype {weight.dtype}, which is not FP8 as it is decoded here"
    N, K = weight.shape
    if scales.numel() == 1 and block is None:
        block, scales = (N, K), scales.reshape(1, 1)
    elif block is None:
        if scales.numel() != N or scales.shape[0] != N:
            reason = f"scales of shape {tuple(scales.shape)} are neither one nor one for each of {N} rows"
            return reason if scales.numel() == N else Damaged(reason)
        block, scales = (1, K), scales.reshape(N, 1)
    kind = "e8m0" if scales.dtype in (torch.uint8, getattr(torch, "float8_e8m0fnu", None)) else "float"
    return small_floats(codec, Layout((N, K), value, (int(block[0]), int(block[1])), kind), weight, scales)
