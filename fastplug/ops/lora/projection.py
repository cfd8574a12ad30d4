"""A linear projection with its adapter as the ops see it, and what its forward leaves for its backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from fastplug.quant.codec import EncodedWeight

Grads = list[torch.Tensor | None]


class Kept(NamedTuple):
    """What a group's forward leaves for its backward, all of it small, or nothing without adapters.

    Attributes:
        xa: s · dropout(x) Aᵀ [tokens, rank].
        a: The stacked A [rank, in_features] in the compute dtype.
        b: The block-diagonal B [out_features, rank] in the compute dtype.
        masks: The dropout masks [tokens, in_features] (bool), one per adapter, None where nothing was dropped.
        scale, output: Of DoRA, see :class:`fastplug.ops.lora.dora.DoraGroup`: magnitude / norm and norm
            [2, out_features], and the output before it is scaled [tokens, out_features].
        base: The decoded base weights, in the order of the products, where the backward is not to decode them again.
            (The node keeps them apart from :meth:`tensors`.)
    """

    xa: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    masks: tuple[torch.Tensor | None, ...] = ()
    scale: torch.Tensor | None = None
    output: torch.Tensor | None = None
    base: tuple[torch.Tensor, ...] = ()

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """For ``save_for_backward``."""
        return (self.xa, self.a, self.b, self.scale, self.output, *self.masks)

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor | None]) -> Kept:
        """From what :meth:`tensors` gave."""
        xa, a, b, scale, output, *masks = tensors
        return cls(xa, a, b, tuple(masks), scale, output)


class FromOutput(NamedTuple):
    """What follows from the gradient g of a group's output and its adapters alone.

    Attributes:
        gb: s · g B [tokens, rank].
        b: The gradient of each adapter's B [its rows, its rank], where one pass over g has made them along with ``gb``.
        normed: ``gb`` times 1/rms of the norm that makes x, where that came along as well.
    """

    gb: torch.Tensor
    b: tuple[torch.Tensor, ...] = ()
    normed: torch.Tensor | None = None


class Normed(NamedTuple):
    """The input of a group that an RMSNorm makes, as what it is made of: 1/rms · h · (offset + weight).

    The gradients of A are Σ_t gb · input: 1/rms goes into the thin gb and the weight into the result, so that the
    input need not be made again for them.

    Attributes:
        h: The norm's input [tokens, in_features] in the compute dtype.
        rstd: 1/rms [tokens].
        weight: [in_features] or None.
        offset: Added to the weight.
    """

    h: torch.Tensor
    rstd: torch.Tensor
    weight: torch.Tensor | None
    offset: float


PER_PROJECTION = 4  # weight, bias, A, B: what a projection hands to autograd, see Projection.tensors


@dataclass
class Projection:
    """One linear projection as the ops see it.

    Attributes:
        read: Reads the weight as it is now. Called again in the backward, so that nothing unsharded or decoded is
            kept between the two.
        shape: (out_features, in_features).
        bias: [out_features] or None.
        a, b: The LoRA matrices [rank, in_features] and [out_features, rank], or None.
        scaling: The factor on the LoRA update.
        dropout: The probability with which the adapter's input is dropped; 0 outside training.
        trained: The dense weight if it needs a gradient, else None.
        owner: What the weight belongs to, so that what is derived from it can be found again.
        magnitude: DoRA's magnitudes [out_features], or None.
    """

    read: Callable[[], EncodedWeight]
    shape: tuple[int, int]
    bias: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0
    trained: torch.Tensor | None = None
    owner: object = None
    magnitude: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The tensors autograd has to know, in the order of the gradients that :class:`Group` returns."""
        return self.trained, self.bias, self.a, self.b
