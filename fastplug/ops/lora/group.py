"""The products of several projections that read one tensor: forward and backward, on plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastplug.ops.table import OpTable

if TYPE_CHECKING:
    from fastplug.quant.codec import EncodedWeight

Grads = list[torch.Tensor | None]
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

    def _scaled(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """scaling · left @ right [tokens, rank]; the factor is applied before the product is rounded if it is one."""
        product = torch.empty(left.shape[0], right.shape[1], dtype=self.dtype, device=left.device)
        torch.addmm(product, left, right, beta=0, alpha=1.0 if self.scaling is None else self.scaling, out=product)
        if self.scaling is None:
            for p, _, columns in self._blocks():
                product[:, columns].mul_(p.scaling)
        return product

    # --- forward --------------------------------------------------------------------------------------------------

    def forward(
        self, x: torch.Tensor, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor | None]]:
        """y [tokens, out_features] for x [tokens, in_features] in the compute dtype.

        ``out``, if given, is what the products are added to, in place; it has the compute dtype. Returns y, the scaled
        s · dropout(x) Aᵀ [tokens, rank] that the backward needs, and the dropout masks (bool, one per adapter).
        """
        start = out is not None  # whether out already holds something to add to
        if out is None:
            out = torch.empty(x.shape[0], self.out_features, dtype=self.dtype, device=x.device)
        xa: torch.Tensor | None = None
        masks: list[torch.Tensor | None] = []
        if self.adapted:
            if self.dropout:
                xa, masks = self._dropped_products(x)
            else:
                xa = self._scaled(x, self._stacked_a().t())
            torch.addmm(out, xa, self._block_b().t(), beta=1 if start else 0, out=out)
            start = True
        for weight, rows in self._weights():
            part = out[:, rows]
            torch.addmm(part, x, weight.t(), beta=1 if start else 0, out=part)
        row = 0
        for p in self.projections:
            if p.bias is not None:
                out[:, row : row + p.shape[0]] += p.bias.detach()
            row += p.shape[0]
        return out, xa, masks

    def _weights(self) -> list[tuple[torch.Tensor, slice]]:
        """Dense weights in the compute dtype with their rows of y: one for all that had to be decoded together."""
        encoded = [p.read() for p in self.projections]
        dense = [weight.dense(self.dtype) for weight in encoded]
        if any(weight is None for weight in dense):
            buffer = torch.empty(
                self.out_features, self.in_features, dtype=self.dtype, device=encoded[0].tensors[0].device
            )
            row = 0
            for weight in encoded:
                weight.decode(buffer[row : row + weight.shape[0]], self.ops)
                row += weight.shape[0]
            return [(buffer, slice(0, self.out_features))]
        parts, row = [], 0
        for weight in dense:
            assert weight is not None
            parts.append((weight, slice(row, row + len(weight))))
            row += len(weight)
        return parts

    def _dropped_products(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """PEFT drops the input of every adapter on its own, in the order of the projections."""
        xa = torch.empty(x.shape[0], self.rank, dtype=self.dtype, device=x.device)
        masks: list[torch.Tensor | None] = []
        for p, _, columns in self._blocks():
            assert p.a is not None
            dropped, mask = drop(x, p.dropout)
            masks.append(mask)
            part = xa[:, columns]
            torch.addmm(part, dropped, p.a.detach().to(self.dtype).t(), beta=0, alpha=p.scaling, out=part)
        return xa, masks

    # --- backward -------------------------------------------------------------------------------------------------

    def input_gradient(
        self, g: torch.Tensor, masks: Sequence[torch.Tensor | None], needs_dx: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The gradient of x (None if not wanted) and s · g B [tokens, rank], for g [tokens, out_features]."""
        gb = self._scaled(g, self._block_b()) if self.adapted else None
        if not needs_dx:
            return None, gb
        dx = None if gb is None else self._adapter_dx(gb, masks)
        start = dx is not None
        if dx is None:
            dx = torch.empty(g.shape[0], self.in_features, dtype=self.dtype, device=g.device)
        for weight, rows in self._weights():
            torch.addmm(dx, g[:, rows], weight, beta=1 if start else 0, out=dx)
            start = True
        return dx, gb

    def parameter_gradients(
        self,
        g: torch.Tensor,
        gb: torch.Tensor | None,
        x: torch.Tensor | None,
        xa: torch.Tensor | None,
        masks: Sequence[torch.Tensor | None],
        needs: Sequence[bool],
    ) -> Grads:
        """Gradients of :meth:`tensors` where ``needs`` is true; ``x`` may be None if none of them is."""
        grads: Grads = [None] * len(needs)
        if gb is not None and xa is not None:
            self._adapter_grads(g, x, gb, xa, masks, needs, grads)
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
        return grads

    def _adapter_grads(
        self,
        g: torch.Tensor,
        x: torch.Tensor | None,
        gb: torch.Tensor,
        xa: torch.Tensor,
        masks: Sequence[torch.Tensor | None],
        needs: Sequence[bool],
        grads: Grads,
    ) -> None:
        index = {id(p): i * PER_PROJECTION for i, p in enumerate(self.projections)}
        shared_da: torch.Tensor | None = None
        for j, (p, rows, columns) in enumerate(self._blocks()):
            assert p.a is not None
            assert p.b is not None
            i = index[id(p)]
            if needs[i + 2]:
                assert x is not None
                if self.dropout:
                    grads[i + 2] = mm(gb[:, columns].t(), undrop(x, masks[j], p.dropout), p.a.dtype)
                else:
                    if shared_da is None:
                        shared_da = mm(gb.t(), x, torch.float32 if p.a.dtype == torch.float32 else self.dtype)
                    grads[i + 2] = shared_da[columns].to(p.a.dtype)
            if needs[i + 3]:
                grads[i + 3] = mm(g[:, rows].t(), xa[:, columns], p.b.dtype)

    def _adapter_dx(self, gb: torch.Tensor, masks: Sequence[torch.Tensor | None]) -> torch.Tensor:
        if not self.dropout:
            return gb @ self._stacked_a()
        dx: torch.Tensor | None = None
        for j, (p, _, columns) in enumerate(self._blocks()):
            assert p.a is not None
            part = undrop(gb[:, columns] @ p.a.detach().to(self.dtype), masks[j], p.dropout)
            dx = part if dx is None else dx.add_(part)
        assert dx is not None
        return dx


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
