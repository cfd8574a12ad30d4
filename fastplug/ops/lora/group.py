"""The products of several projections that read one tensor: forward and backward, on plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastplug.ops.table import OpTable

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
    """

    xa: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    masks: tuple[torch.Tensor | None, ...] = ()

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """For ``save_for_backward``."""
        return (self.xa, self.a, self.b, *self.masks)

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor | None]) -> Kept:
        """From what :meth:`tensors` gave."""
        return cls(tensors[0], tensors[1], tensors[2], tuple(tensors[3:]))


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
    """

    read: Callable[[], EncodedWeight]
    shape: tuple[int, int]
    bias: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0
    trained: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The tensors autograd has to know, in the order of the gradients that :class:`Group` returns."""
        return self.trained, self.bias, self.a, self.b


class Group:
    """Projections of one tensor x [tokens, in_features], computed in one dtype.

    Adapters share one stacked A; B is laid out block-diagonally, so that one skinny product serves all of them.
    """

    def __init__(self, projections: Sequence[Projection], dtype: torch.dtype, ops: OpTable) -> None:
        self.projections = projections
        self.dtype = dtype
        self.ops = ops
        self.out_features = sum(p.shape[0] for p in projections)
        self.in_features = projections[0].shape[1]
        self.adapted = [p for p in projections if p.a is not None]
        self.rank = sum(len(p.a) for p in self.adapted if p.a is not None)
        self.dropout = any(p.dropout for p in self.adapted)
        scalings = {p.scaling for p in self.adapted}
        self.scaling = scalings.pop() if len(scalings) == 1 else None  # None: one per projection

    def tensors(self) -> list[torch.Tensor | None]:
        return [tensor for p in self.projections for tensor in p.tensors]

    # --- adapters -------------------------------------------------------------------------------------------------

    def _stacked_a(self) -> torch.Tensor:
        """[rank, in_features] in the compute dtype."""
        parts = [p.a.detach() for p in self.adapted if p.a is not None]
        if len(parts) == 1:
            return parts[0].to(self.dtype)
        stacked = parts[0].new_empty(self.rank, self.in_features, dtype=self.dtype)
        torch._foreach_copy_(list(stacked.split([len(a) for a in parts])), parts)
        return stacked

    def _block_b(self) -> torch.Tensor:
        """[out_features, rank] in the compute dtype, block-diagonal."""
        if len(self.projections) == 1:
            b = self.adapted[0].b
            assert b is not None
            return b.detach().to(self.dtype)
        b0 = self.adapted[0].b
        assert b0 is not None
        block = b0.new_zeros(self.out_features, self.rank, dtype=self.dtype)
        for p, rows, columns in self._blocks():
            assert p.b is not None
            block[rows, columns] = p.b.detach()
        return block

    def _blocks(self) -> list[tuple[Projection, slice, slice]]:
        """(projection, its rows of y, its columns of x Aᵀ) of every adapted projection."""
        blocks = []
        row = column = 0
        for p in self.projections:
            if p.a is not None:
                blocks.append((p, slice(row, row + p.shape[0]), slice(column, column + len(p.a))))
                column += len(p.a)
            row += p.shape[0]
        return blocks

    def _tiles(self, tensor: torch.Tensor) -> list[tuple[slice, slice]]:
        """(rows of y, columns of x Aᵀ) of the products with B.

        One, zeros included, saves launches on a GPU; a CPU has none to save, and a zero takes as long as a number.
        """
        if tensor.device.type == "cpu" and len(self.adapted) == len(self.projections):
            return [(rows, columns) for _, rows, columns in self._blocks()]
        return [(slice(0, self.out_features), slice(0, self.rank))]

    def _scaled_gb(self, g: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """scaling · g B [tokens, rank] for the block-diagonal B."""
        tiles = self._tiles(g)
        if len(tiles) == 1:
            return self._scaled(g, b)
        product = torch.empty(g.shape[0], self.rank, dtype=self.dtype, device=g.device)
        for (rows, columns), p in zip(tiles, self.adapted, strict=True):
            product[:, columns].addmm_(g[:, rows], b[rows, columns], beta=0, alpha=p.scaling)
        return product

    def _scaled(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """scaling · left @ right [tokens, rank]; the factor is applied before the product is rounded if it is one."""
        product = torch.empty(left.shape[0], right.shape[1], dtype=self.dtype, device=left.device)
        product.addmm_(left, right, beta=0, alpha=1.0 if self.scaling is None else self.scaling)
        if self.scaling is None:
            for p, _, columns in self._blocks():
                product[:, columns].mul_(p.scaling)
        return product

    # --- forward --------------------------------------------------------------------------------------------------

    def adapters(self, x: torch.Tensor) -> Kept:
        """The skinny part of the forward: everything that the backward keeps."""
        if not self.adapted:
            return Kept()
        a, b = self._stacked_a(), self._block_b()
        if not self.dropout:
            return Kept(self._scaled(x, a.t()), a, b, (None,) * len(self.adapted))
        xa = torch.empty(x.shape[0], self.rank, dtype=self.dtype, device=x.device)
        masks = []
        for p, _, columns in self._blocks():  # PEFT drops the input of each adapter on its own, in this order
            dropped, mask = drop(x, p.dropout)
            masks.append(mask)
            xa[:, columns].addmm_(dropped, a[columns].t(), beta=0, alpha=p.scaling)
        return Kept(xa, a, b, tuple(masks))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        """y [tokens, out_features] for x [tokens, in_features] in the compute dtype, and what the backward needs."""
        kept = self.adapters(x)
        return self.products(x, kept), kept

    def products(
        self, x: torch.Tensor, kept: Kept, out: torch.Tensor | None = None, factor: float = 1.0
    ) -> torch.Tensor:
        """factor · y, given :meth:`adapters`; added in place to ``out`` (of the compute dtype), if that is given."""
        start = out is not None  # whether out already holds something to add to
        if out is None:
            out = torch.empty(x.shape[0], self.out_features, dtype=self.dtype, device=x.device)
        if kept.xa is not None and kept.b is not None:
            for rows, columns in self._tiles(x):
                out[:, rows].addmm_(
                    kept.xa[:, columns], kept.b[rows, columns].t(), beta=1 if start else 0, alpha=factor
                )
            start = True
        for weight, rows in self._weights():
            out[:, rows].addmm_(x, weight.t(), beta=1 if start else 0, alpha=factor)
        row = 0
        for p in self.projections:
            if p.bias is not None:
                out[:, row : row + p.shape[0]].add_(p.bias.detach(), alpha=factor)
            row += p.shape[0]
        return out

    def _weights(self) -> list[tuple[torch.Tensor, slice]]:
        """Dense weights in the compute dtype with their rows of y: one for all that had to be decoded together."""
        encoded = [p.read() for p in self.projections]
        dense = [weight.dense(self.dtype) for weight in encoded]
        device = encoded[0].tensors[0].device
        if any(weight is None for weight in dense) and device.type != "cpu":  # a CPU gains nothing by one product
            buffer = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=device)
            row = 0
            for weight in encoded:
                weight.decode(buffer[row : row + weight.shape[0]], self.ops)
                row += weight.shape[0]
            return [(buffer, slice(0, self.out_features))]
        parts, row = [], 0
        for weight, matrix in zip(encoded, dense, strict=True):
            if matrix is None:
                matrix = torch.empty(weight.shape, dtype=self.dtype, device=device)
                weight.decode(matrix, self.ops)
            parts.append((matrix, slice(row, row + len(matrix))))
            row += len(matrix)
        return parts

    # --- backward -------------------------------------------------------------------------------------------------

    def input_gradient(
        self, g: torch.Tensor, kept: Kept, needs_dx: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The gradient of x (None if not wanted) and s · g B [tokens, rank], for g [tokens, out_features]."""
        gb = None if kept.b is None else self._scaled_gb(g, kept.b)
        if not needs_dx:
            return None, gb
        dx = None if gb is None else self._adapter_dx(gb, kept)
        start = dx is not None
        if dx is None:
            dx = torch.empty(g.shape[0], self.in_features, dtype=self.dtype, device=g.device)
        for weight, rows in self._weights():
            dx.addmm_(g[:, rows], weight, beta=1 if start else 0)
            start = True
        return dx, gb

    def _adapter_dx(self, gb: torch.Tensor, kept: Kept) -> torch.Tensor:
        assert kept.a is not None
        if not self.dropout:
            return gb @ kept.a
        dx: torch.Tensor | None = None
        for (p, _, columns), mask in zip(self._blocks(), kept.masks):
            part = undrop(gb[:, columns] @ kept.a[columns], mask, p.dropout)
            dx = part if dx is None else dx.add_(part)
        assert dx is not None
        return dx

    def parameter_gradients(
        self, g: torch.Tensor, gb: torch.Tensor | None, x: torch.Tensor | None, kept: Kept, needs: Sequence[bool]
    ) -> Grads:
        """Gradients of :meth:`tensors` where ``needs`` is true; ``x`` may be None if none of them is."""
        grads: Grads = [None] * len(needs)
        row = 0
        for i, p in enumerate(self.projections):
            part = g[:, row : row + p.shape[0]]
            if needs[i * PER_PROJECTION]:
                assert x is not None
                assert p.trained is not None
                grads[i * PER_PROJECTION] = mm(part.t(), x, p.trained.dtype)
            if needs[i * PER_PROJECTION + 1]:
                assert p.bias is not None
                grads[i * PER_PROJECTION + 1] = part.sum(0, dtype=torch.float32).to(p.bias.dtype)
            row += p.shape[0]
        if gb is not None and kept.xa is not None:
            self._adapter_gradients(g, gb, x, kept, needs, grads)
        return grads

    def _adapter_gradients(
        self,
        g: torch.Tensor,
        gb: torch.Tensor,
        x: torch.Tensor | None,
        kept: Kept,
        needs: Sequence[bool],
        grads: Grads,
    ) -> None:
        index = {id(p): i * PER_PROJECTION for i, p in enumerate(self.projections)}
        shared: torch.Tensor | None = None  # the gradients of all A, in one product, where nothing was dropped
        for (p, rows, columns), mask in zip(self._blocks(), kept.masks):
            i = index[id(p)]
            assert p.a is not None
            assert p.b is not None
            assert kept.xa is not None
            if needs[i + 2]:
                assert x is not None
                if self.dropout:
                    grads[i + 2] = mm(gb[:, columns].t(), undrop(x, mask, p.dropout), p.a.dtype)
                else:
                    if shared is None:
                        shared = mm(gb.t(), x, torch.float32 if p.a.dtype == torch.float32 else self.dtype)
                    grads[i + 2] = shared[columns].to(p.a.dtype)
            if needs[i + 3]:
                grads[i + 3] = mm(g[:, rows].t(), kept.xa[:, columns], p.b.dtype)


def mm(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """left @ right in ``dtype``, from an fp32 accumulator without a rounding between where the backend can."""
    if left.is_cuda and dtype == torch.float32 and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).to(dtype)


def drop(x: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Inverted dropout, drawing random numbers exactly as ``torch.nn.functional.dropout`` does; the mask is bool."""
    if p == 0.0:
        return x, None
    if x.is_cuda:
        return torch.native_dropout(x, p, True)
    keep = torch.empty_like(x).bernoulli_(1 - p).bool()
    return undrop(x, keep, p), keep


def undrop(x: torch.Tensor, mask: torch.Tensor | None, p: float) -> torch.Tensor:
    """Apply a saved dropout mask: x · mask / (1 - p)."""
    if mask is None:
        return x
    return torch.where(mask, x * (1.0 / (1.0 - p)), 0.0) if p < 1 else torch.zeros_like(x)
