"""A group's base products in FP8: y = x Wᵀ and dx = g W, each with scales along its own rows and columns.

A product of FP8 matrices on a Hopper GPU wants both operands with the summed dimension last, so dx takes W transposed,
[in_features, out_features], with a scale for each input channel; y takes W as it is, with a scale for each output
channel. Adapters stay exact beside it; where the op can, their share is added before the product is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastplug.ops.lora.kept_weights import Empty, KeptWeights
from fastplug.ops.recompute import recomputing

if TYPE_CHECKING:
    from fastplug.ops.lora.group import Group
    from fastplug.ops.lora.projection import Kept as GroupKept

MULTIPLE = 16  # of every dimension of an FP8 product, see torch._scaled_mm


class Quantized(NamedTuple):
    """e4m3 values and their fp32 scales, one a row."""

    values: torch.Tensor
    scale: torch.Tensor


class Share(NamedTuple):
    """An adapter's share of a product, left rightᵀ: [tokens, rank] and [features, rank]."""

    left: torch.Tensor
    right: torch.Tensor


@dataclass
class Fp8:
    """Which base products run in FP8.

    Attributes:
        forward: Whether y does. Else only dx, and a y that gradient checkpointing computes again.
        keep: Whether weights stay in FP8 from step to step: True, False, or None for as long as half of the
            device's memory stays free.
    """

    forward: bool
    keep: bool | None = None
    kept: KeptWeights = field(init=False)

    def __post_init__(self) -> None:
        self.kept = KeptWeights(self.keep)

    def covers(self, group: Group) -> bool:
        """Whether all products of a group can be FP8: frozen weights, dimensions in multiples of 16, in bf16.

        PyTorch's FP8 product with scales of rows puts out bf16 only.
        """
        trained = any(p.trained is not None for p in group.projections)
        sizes = any(size % MULTIPLE for p in group.projections for size in p.shape)
        return group.dtype == torch.bfloat16 and not trained and not sizes

    def output(self, group: Group, x: torch.Tensor, kept: GroupKept) -> torch.Tensor | None:
        """x Wᵀ and the adapters' share of y [tokens, out_features], or None where y is to be exact."""
        if not self.forward and not recomputing():
            return None
        share = None if kept.xa is None or kept.b is None else Share(kept.xa, kept.b)
        y, added = self._product(group, x, False, share)
        if not added:
            group.add_output_share(y, kept)
        return y

    def input_gradient(self, group: Group, g: torch.Tensor, gb: torch.Tensor | None, kept: GroupKept) -> torch.Tensor:
        """g W and the adapters' share of the gradient of x [tokens, in_features]."""
        share = None if gb is None or kept.a is None or group.adapted.dropout else Share(gb, kept.a.t())
        dx, added = self._product(group, g, True, share)
        if gb is not None and not added:
            group.add_input_share(dx, gb, kept)
        return dx

    def _product(
        self, group: Group, x: torch.Tensor, transposed: bool, share: Share | None
    ) -> tuple[torch.Tensor, bool]:
        """The base product, and whether the share has been added to it."""
        fp8 = group.ops.fp8
        rows, weight = Quantized(*fp8.quantize_rows(x)), self._weight(group, transposed, x.device)
        y = None if share is None else fp8.product_add(*rows, *weight, *share, group.dtype)
        return (fp8.product(*rows, *weight, group.dtype), False) if y is None else (y, True)

    def _weight(self, group: Group, transposed: bool, device: torch.device) -> Quantized:
        def make(empty: Empty) -> Quantized:
            return _quantize(group, transposed)

        owners = [p.owner for p in group.projections]
        name = "transposed e4m3" if transposed else "e4m3"
        return self.kept.get(owners, name, group.stored_state, make, device)[0]


def _quantize(group: Group, transposed: bool) -> Quantized:
    weight = group.decoded()
    fp8 = group.ops.fp8
    if not transposed:
        return Quantized(*fp8.quantize_rows(weight))
    scale = fp8.column_scales(weight)
    return Quantized(fp8.quantize_columns(weight, scale), scale)
