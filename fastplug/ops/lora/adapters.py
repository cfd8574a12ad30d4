"""The skinny products of a group: everything in which A and B of its adapters take part.

Adapters share one stacked A; B is laid out block-diagonally, so that one skinny product serves all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastplug.ops.adapter_gradients.reference import Places
from fastplug.ops.add_product import add_product
from fastplug.ops.lora.matmul import drop, joins, mm, undrop
from fastplug.ops.lora.projection import PER_PROJECTION, FromOutput, Grads, Kept, Normed, Projection
from fastplug.ops.table import OpTable


class Block(NamedTuple):
    """An adapted projection, its rows of y and its columns of x Aᵀ."""

    projection: Projection
    rows: slice
    columns: slice


class Adapters:
    """The adapters of projections of one tensor x [tokens, in_features], computed in ``dtype``."""

    def __init__(self, projections: Sequence[Projection], dtype: torch.dtype, ops: OpTable) -> None:
        self.dtype = dtype
        self.ops = ops
        self.count = len(projections)
        self.out_features = sum(p.shape[0] for p in projections)
        self.in_features = projections[0].shape[1]
        self.blocks: list[Block] = []
        row = column = 0
        for p in projections:
            if p.a is not None:
                self.blocks.append(Block(p, slice(row, row + p.shape[0]), slice(column, column + len(p.a))))
                column += len(p.a)
            row += p.shape[0]
        self.rank = column
        self.dropout = any(block.projection.dropout for block in self.blocks)
        scalings = {block.projection.scaling for block in self.blocks}
        self.scaling = scalings.pop() if len(scalings) == 1 else None  # None: one per projection
        self._index = {id(p): i * PER_PROJECTION for i, p in enumerate(projections)}
        self._places = Places(
            (0, *(block.rows.stop for block in self.blocks)), (0, *(block.columns.stop for block in self.blocks))
        )

    # --- matrices -------------------------------------------------------------------------------------------------

    def tiles(self, tensor: torch.Tensor) -> list[tuple[slice, slice]]:
        """(rows of y, columns of x Aᵀ) of the products with B; of one for all, zeros included."""
        if not joins(tensor.device) and len(self.blocks) == self.count:
            return [(rows, columns) for _, rows, columns in self.blocks]
        return [(slice(0, self.out_features), slice(0, self.rank))]

    def _scaled(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """scaling · left @ right into ``out`` [tokens, rank]; the factor comes before the rounding if it is one."""
        add_product(out, left, right, 0.0, 1.0 if self.scaling is None else self.scaling)
        if self.scaling is None:
            for p, _, columns in self.blocks:
                out[:, columns].mul_(p.scaling)
        return out

    def _empty(self, tokens: int, like: torch.Tensor) -> torch.Tensor:
        return torch.empty(tokens, self.rank, dtype=self.dtype, device=like.device)

    # --- forward --------------------------------------------------------------------------------------------------

    def matrices(self) -> Kept:
        """A and B, all that the backward keeps but for what follows from x."""
        if not self.blocks:
            return Kept()
        a = [p.a.detach() for p, _, _ in self.blocks if p.a is not None]
        b = [p.b.detach() for p, _, _ in self.blocks if p.b is not None]
        rows = [block.rows.start for block in self.blocks]
        stacked, block = self.ops.adapter_matrices.matrices(a, b, rows, self.out_features, self.dtype)
        return Kept(None, stacked, block, (None,) * len(self.blocks))

    def forward(self, x: torch.Tensor, matrices: Kept | None = None) -> Kept:
        """Everything that the backward keeps, for x [tokens, in_features] in the compute dtype."""
        kept = self.matrices() if matrices is None else matrices
        a = kept.a
        if a is None:
            return kept
        xa = self._empty(len(x), x)
        if not self.dropout:
            return kept._replace(xa=self._scaled(x, a.t(), xa))
        masks = []
        for p, _, columns in self.blocks:  # PEFT drops the input of each adapter on its own, in this order
            dropped, mask = drop(x, p.dropout)
            masks.append(mask)
            add_product(xa[:, columns], dropped, a[columns].t(), 0.0, p.scaling)
        return kept._replace(xa=xa, masks=tuple(masks))

    def add(self, out: torch.Tensor, kept: Kept, start: bool, factor: float) -> bool:
        """Write factor · xa Bᵀ into ``out`` [tokens, out_features], or add it if ``start``; whether out holds y now."""
        if kept.xa is None or kept.b is None:
            return start
        for rows, columns in self.tiles(out):
            add_product(out[:, rows], kept.xa[:, columns], kept.b[rows, columns].t(), 1.0 if start else 0.0, factor)
        return True

    # --- backward -------------------------------------------------------------------------------------------------

    def from_output(
        self, g: torch.Tensor, kept: Kept, needs: Sequence[bool], rstd: torch.Tensor | None = None
    ) -> FromOutput | None:
        """What follows from g [tokens, out_features], with the gradients of B where one pass makes them and they are
        asked for, all of them; ``needs`` and ``rstd`` are as of :meth:`Group.input_gradient`."""
        if kept.b is None:
            return None
        one, wanted = self.ops.adapter_gradients, needs[3 : PER_PROJECTION * self.count : PER_PROJECTION]
        there = kept.xa is not None and len(kept.xa) == len(g)
        if there and len(self.blocks) == self.count and all(wanted) and one.suits(g, kept.xa, kept.b, self._places):
            scalings = [block.projection.scaling for block in self.blocks]
            return FromOutput(*one.gradients(g, kept.xa, kept.b, self._places, scalings, rstd))
        return FromOutput(self.scaled_gb(g, kept))

    def scaled_gb(self, g: torch.Tensor, kept: Kept) -> torch.Tensor:
        """scaling · g B [tokens, rank] for g [tokens, out_features]."""
        assert kept.b is not None
        out = self._empty(len(g), g)
        tiles = self.tiles(g)
        if len(tiles) == 1:
            return self._scaled(g, kept.b, out)
        for (rows, columns), block in zip(tiles, self.blocks, strict=True):
            add_product(out[:, columns], g[:, rows], kept.b[rows, columns], 0.0, block.projection.scaling)
        return out

    def dx(self, gb: torch.Tensor, kept: Kept) -> torch.Tensor:
        """The adapters' share of the gradient of x [tokens, in_features]."""
        assert kept.a is not None
        if not self.dropout:
            return gb @ kept.a
        dx: torch.Tensor | None = None
        for (p, _, columns), mask in zip(self.blocks, kept.masks):
            part = undrop(gb[:, columns] @ kept.a[columns], mask, p.dropout)
            dx = part if dx is None else dx.add_(part)
        assert dx is not None
        return dx

    def parameter_gradients(
        self,
        g: torch.Tensor,
        known: FromOutput,
        x: torch.Tensor | Normed | None,
        kept: Kept,
        needs: Sequence[bool],
        grads: Grads,
    ) -> None:
        """Fill in the gradients of A and B; see :meth:`Group.parameter_gradients`."""
        gb = known.gb
        shared: torch.Tensor | None = None  # the gradients of all A, in one product, where nothing was dropped
        for j, ((p, rows, columns), mask) in enumerate(zip(self.blocks, kept.masks)):
            i = self._index[id(p)]
            assert p.a is not None
            assert p.b is not None
            assert kept.xa is not None
            if needs[i + 2]:
                assert x is not None
                if self.dropout:
                    assert isinstance(x, torch.Tensor)
                    grads[i + 2] = mm(gb[:, columns].t(), undrop(x, mask, p.dropout), p.a.dtype)
                else:
                    if shared is None:
                        shared = self._gbx(known, x, torch.float32 if p.a.dtype == torch.float32 else self.dtype)
                    grads[i + 2] = shared[columns].to(p.a.dtype)
            if needs[i + 3] and known.b:
                grads[i + 3] = known.b[j].to(p.b.dtype)
            elif needs[i + 3]:
                grads[i + 3] = mm(g[:, rows].t(), kept.xa[:, columns], p.b.dtype)

    @staticmethod
    def _gbx(known: FromOutput, x: torch.Tensor | Normed, dtype: torch.dtype) -> torch.Tensor:
        """gbᵀ x [rank, in_features]."""
        gb, left = known.gb, known.normed
        if isinstance(x, torch.Tensor):
            return mm(gb.t(), x, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        if left is None:
            left = torch.mul(gb, x.rstd[:, None], out=torch.empty_like(gb))  # rounded where it is multiplied: one pass
        product = mm(left.t(), x.h, wide)
        if x.weight is not None:
            weight = x.weight.detach()
            product *= (weight.to(wide) + x.offset) if x.offset else weight
        return product
