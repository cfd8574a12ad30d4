"""What the codecs share: weights that the ops ``int_weights`` and ``float_weights`` decode.

A codec of a library's layer finds the tensors and names their layout; :func:`integers` and :func:`small_floats` make
an :class:`EncodedWeight` of them, or say why they do not fit together. Only shapes and dtypes are looked at, for a
weight is read at every step. :func:`problems` looks at the values, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastplug.ops import float_weights, int_weights
from fastplug.ops.float_weights import reference as float_reference
from fastplug.ops.int_weights import reference as int_reference
from fastplug.ops.table import OpTable
from fastplug.quant.codec import EncodedWeight


class Packed:
    """A codec whose weights are :func:`integers` or :func:`small_floats`. Subclasses say how a layer is read.

    Attributes:
        name: The format.
        note: What a report says about layers of this format, if anything.
    """

    name = "packed"
    note: str | None = None

    def matches(self, linear: nn.Module) -> bool:
        return False

    def read(self, linear: nn.Module) -> EncodedWeight | str:
        return f"a {type(linear).__name__} is not {self.name}"

    def compute_dtype(self, linear: nn.Module, dtype: torch.dtype) -> torch.dtype | str:
        return dtype

    def dense(self, weight: EncodedWeight, dtype: torch.dtype) -> torch.Tensor | None:
        return None

    def decode(self, weight: EncodedWeight, out: torch.Tensor, ops: OpTable, row_start: int = 0) -> None:
        layout: Any = weight.layout[0]
        codes, scales, *rest = weight.tensors
        if isinstance(layout, int_weights.Layout):
            zeros, g_idx = (*rest, None, None)[:2]
            ops.int_weights.decode(codes, scales, layout, out, zeros=zeros, g_idx=g_idx, row_start=row_start)
        else:
            outer = rest[0] if rest else None
            ops.float_weights.decode(codes, scales, layout, out, outer=outer, row_start=row_start)

    def problems(self, weight: EncodedWeight, linear: nn.Module) -> Iterator[tuple[torch.Tensor, str]]:
        """What is wrong with the values of ``weight`` and its module: see :func:`problems`."""
        return problems(weight)


def integers(
    codec: Any,
    layout: int_weights.Layout,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    g_idx: torch.Tensor | None = None,
) -> EncodedWeight | str:
    """The weight of these tensors (see :func:`fastplug.ops.int_weights.reference.decode`), or why they are none."""
    reason = int_reference.mismatch(codes, scales, layout, zeros, g_idx)
    if reason is not None:
        return reason
    if g_idx is not None and zeros is None:
        return "columns in an order of their own need zero points"
    tensors = tuple(tensor for tensor in (codes, scales, zeros, g_idx) if tensor is not None)
    return EncodedWeight(codec, tensors, layout.shape, (layout,))


def small_floats(
    codec: Any,
    layout: float_weights.Layout,
    codes: torch.Tensor,
    scales: torch.Tensor,
    outer: torch.Tensor | None = None,
) -> EncodedWeight | str:
    """The weight of these tensors (see :func:`fastplug.ops.float_weights.reference.decode`), or why they are none."""
    reason = float_reference.mismatch(codes, scales, layout, outer)
    if reason is not None:
        return reason
    return EncodedWeight(codec, (codes, scales) if outer is None else (codes, scales, outer), layout.shape, (layout,))


def problems(weight: EncodedWeight) -> Iterator[tuple[torch.Tensor, str]]:
    """Pairs of a flag (bool, no dimensions, on the weight's device) and what is wrong where it is true."""
    layout: Any = weight.layout[0]
    _, scales, *rest = weight.tensors
    if isinstance(layout, int_weights.Layout):
        yield ~scales.isfinite().all(), "scales that are NaN or infinite"
        if rest and rest[0].is_floating_point():
            yield ~rest[0].isfinite().all(), "zero points that are NaN or infinite"
        if len(rest) > 1:
            wrong = (rest[1] < 0) | (rest[1] >= scales.shape[1])
            yield wrong.any(), f"columns in groups (g_idx) beyond the {scales.shape[1]} that have scales"
        return
    exponents = scales.view(torch.uint8) == 255 if layout.scale == "e8m0" else ~scales.float().isfinite()
    yield exponents.any(), "scales that are NaN or infinite"
    if rest:
        wrong = ~rest[0].isfinite() | (rest[0] == 0) if layout.divide else ~rest[0].isfinite()
        yield wrong.any(), "a second scale that is zero, NaN or infinite"
