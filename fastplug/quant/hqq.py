"""HQQ weights (Badri and Shaji 2023, mobiusml.github.io/hqq_blog): layers of the package ``hqq``.

Integers of 1 to 8 bits with scales and zero points that are no integers, for groups of a row (axis 1) or, column by
column, for rows that lie apart (axis 0).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastplug.ops.int_weights import Layout
from fastplug.quant.codec import Damaged, EncodedWeight
from fastplug.quant.packed import Packed, integers
from fastplug.quant.versions import of_known_version, unknown
from fastplug.sharding import SHARDED, distributed

PACKINGS = {"8bit_u8": 8, "4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}


class HQQ(Packed):
    name = "hqq"

    def matches(self, linear: nn.Module) -> bool:
        return type(linear).__module__ == "hqq.core.quantize" and type(linear).__name__ == "HQQLinear"

    @of_known_version()
    def read(self, linear: nn.Module) -> EncodedWeight | str:
        packed, meta = getattr(linear, "W_q", None), getattr(linear, "meta", None)
        if packed is None or meta is None or not getattr(linear, "ready", False):
            return "its HQQ weight is not quantized yet"
        if distributed(packed):
            return f"its HQQ weight {SHARDED}"
        if not isinstance(linear.compute_dtype, torch.dtype):
            return unknown(linear, f"its compute_dtype is {linear.compute_dtype!r}")
        return hqq(self, packed.detach(), meta)  # type: ignore[operator, arg-type]

    def compute_dtype(self, linear: nn.Module, dtype: torch.dtype) -> torch.dtype | str:
        found: torch.dtype = linear.compute_dtype  # type: ignore[assignment]
        return found


def hqq(codec: Any, packed: torch.Tensor, meta: dict[str, Any]) -> EncodedWeight | str:
    """An HQQ weight from its packed codes and what ``hqq`` calls its ``meta``, or the reason why these are none."""
    if meta.get("quant_scale") or meta.get("quant_zero"):
        return "its scales or zero points are quantized again"
    if "scale" not in meta or "zero" not in meta:
        return "its scales are kept on the host (offload_meta)"
    bits = PACKINGS.get(meta["packing"])
    if bits is None:
        return f"its packing is {meta['packing']!r}"
    N, K = (int(size) for size in meta["shape"])
    word = torch.int32 if bits == 3 else torch.uint8
    codes = packed.view(word) if meta.get("view_as_float") else packed
    if codes.dtype != word:
        return f"its codes have dtype {codes.dtype}, not {word}"
    axis, scales, zeros = int(meta["axis"]), meta["scale"], meta["zero"]
    group = int(meta["group_size"] or (K if axis == 1 else N))
    if group < 1 or (K if axis == 1 else N) % group:
        reason = f"groups of {group} do not divide its {'columns' if axis == 1 else 'rows'} ({N} x {K})"
        return Damaged(reason) if group < 1 or N * K % group else reason  # those of hqq may go on in the next row
    table = (N, K // group) if axis == 1 else (N // group, K)
    if scales.numel() != table[0] * table[1] or zeros.numel() != scales.numel():
        reason = f"{scales.numel()} scales and {zeros.numel()} zero points do not fit {N} x {K} in groups of {group}"
        return reason if scales.numel() == zeros.numel() == 1 else Damaged(reason)  # one for all, without channel_wise
    layout = Layout((N, K), bits, "split", group if axis == 1 else 1)
    return integers(codec, layout, codes, scales.reshape(table), zeros.reshape(table))
