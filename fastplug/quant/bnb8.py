"""bitsandbytes' LLM.int8() weights (Dettmers et al. 2022, arXiv:2208.07339): a byte a weight, ``absmax`` a row.

The library quantizes the activations to 8 bits too, but for columns with outliers. Here the weights are decoded and
multiplied in the dtype of the activations: the same weights, without the error of rounding the activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastplug.ops.int_weights import Layout
from fastplug.quant.codec import Damaged, EncodedWeight
from fastplug.quant.incomplete import incomplete
from fastplug.quant.packed import Packed, integers
from fastplug.quant.versions import of_known_version
from fastplug.sharding import SHARDED, distributed

ONE_127TH = 7.874015718698502e-3  # as bitsandbytes writes 1 / 127


class BitsAndBytes8(Packed):
    name = "bitsandbytes-8bit"
    note = (
        "LLM.int8() weights are decoded and multiplied in 16 or 32 bits; bitsandbytes rounds the activations to 8 bits "
        "as well, so results differ from its own by that rounding"
    )

    def matches(self, linear: nn.Module) -> bool:
        return type(linear).__module__ == "bitsandbytes.nn.modules" and type(linear).__name__ == "Linear8bitLt"

    @of_known_version("bitsandbytes")
    def read(self, linear: nn.Module) -> EncodedWeight | str:
        layer: Any = linear
        weight = layer.weight
        if distributed(weight):
            return f"its 8-bit weight {SHARDED}"
        if weight.dtype != torch.int8:
            return "its 8-bit weight is not quantized yet (move the model to its device first)"
        scales = getattr(weight, "SCB", None)
        scales = layer.state.SCB if scales is None else scales  # after the first forward
        if scales is None:
            return Damaged("its 8-bit weight has no scales (SCB)")
        shape = (layer.out_features, layer.in_features)
        if weight.shape != shape:
            return incomplete(linear, "its 8-bit weight", weight, shape)
        layout = Layout(shape, 8, group=shape[1], sign="twos", factor=ONE_127TH)
        return integers(self, layout, weight.detach(), scales.detach()[:, None])
