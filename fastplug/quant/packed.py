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
from fastplug.quant.codec import Damaged, EncodedWeight


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
    """The weight of these tensors (see :func:`fastplug.ops.int_weights.reference.decode`), or why they are none.

    The reason is :class:`Damaged` where they contradict each other.
    """
    reason = int_reference.mismatch(codes, scales, layout, zeros, g_idx)
    if reason is not None:
        return reason if _other_integers(scales, layout, g_idx) else Damaged(reason)
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
    """The weight of these tensors (see :func:`fastplug.ops.float_weights.reference.decode`), or why they are none.

    The reason is :class:`Damaged` where they contradict each other.
    """
    reason = float_reference.mismatch(codes, scales, layout, outer)
    if reason is not None:
        return reason if _other_floats(codes, scales, layout) else Damaged(reason)
    return EncodedWeight(codec, (codes, scales) if outer is None else (codes, scales, outer), layout.shape, (layout,))


def _other_integers(scales: torch.Tensor, layout: int_weights.Layout, g_idx: torch.Tensor | None) -> bool:
    """Whether tensors that do not fit may be whole all the same, in a layout that is not read here.

    It has codes or dtypes that are not decoded, or all of its scales in another arrangement. Tensors with fewer values
    than the weight needs, or more, fit no layout.
    """
    (N, K), group = layout.shape, layout.group
    if not 1 <= layout.bits <= 8 or layout.packing not in int_reference.PACKINGS:
        return True
    if scales.dtype not in float_reference.SCALES or (layout.packing == "output" and (layout.bits != 4 or N % 8)):
        return True
    if group < 1 or g_idx is not None:
        return False
    groups = -(-K // group)
    fit = scales.dim() == 2 and scales.shape[1] == groups and not N % max(len(scales), 1)
    return not fit and scales.numel() == N * groups


def _other_floats(codes: torch.Tensor, scales: torch.Tensor, layout: float_weights.Layout) -> bool:
    """See :func:`_other_integers`."""
    (N, K), (high, wide) = layout.shape, layout.block
    if codes.element_size() != 1 or (layout.value == "e2m1" and wide % 8):
        return True
    if scales.dtype not in float_reference.SCALES if layout.scale == "float" else scales.element_size() != 1:
        return True
    if high < 1 or wide < 1:
        return False
    blocks = (-(-N // high), -(-K // wide))
    return scales.shape != blocks and scales.numel() == blocks[0] * blocks[1]


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
