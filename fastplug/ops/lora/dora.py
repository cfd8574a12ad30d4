"""DoRA (Liu et al. 2024, arXiv:2402.09353): a LoRA update whose rows are scaled to trained magnitudes.

With W' = W + s B A, its row norms n = ||W'||, the magnitudes m and c = m / n:

    y = c · z + bias    z = x W'ᵀ = x Wᵀ + s x Aᵀ Bᵀ

n is a constant to autograd (section 4.3 of the paper), so with g the gradient of y:

    dm = (Σ_t g · z) / n    dx = (c · g) W'    dA = (s (c · g) B)ᵀ x    dB = c · gᵀ (s x Aᵀ)

B A is never formed, not for n either:

    n² = ||W||² + 2 s (W Aᵀ) · B + s² (B (A Aᵀ)) · B    row by row, in fp32

The products are those of LoRA. What is new: one pass over z (or W) to scale it, one over g and z for dm, one over W (or
g) to scale dx, all as fast as the memory (``ops/scaling``, ``ops/column_dots``), and W Aᵀ. ||W||² is kept as long as W
is the same. z is kept for dm, unless the node that the group is part of keeps y anyway.

With dropout PEFT scales and adapts the dropped input d(x) only, beside the plain product with x:

    y = x Wᵀ + bias - d(x) Wᵀ + c · z    z = d(x) W'ᵀ
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastplug.ops import ahead
from fastplug.ops.add_product import add_product
from fastplug.ops.launch import recording
from fastplug.ops.lora.group import Group, Weight
from fastplug.ops.lora.kept_weights import KeptWeights
from fastplug.ops.lora.matmul import mm, undrop
from fastplug.ops.lora.projection import PER_PROJECTION, FromOutput, Grads, Kept, Normed, Projection
from fastplug.ops.table import OpTable


class Norms(NamedTuple):
    """||W||² of a group's rows, and in which dtype, where and of which version its weights were read for it."""

    dtype: torch.dtype
    state: list[tuple[int, int]]
    squares: torch.Tensor


_norms: weakref.WeakKeyDictionary[object, Norms] = weakref.WeakKeyDictionary()


class DoraGroup(Group):
    """A group of which at least one projection has magnitudes. Its base products are exact, never FP8.

    Attributes:
        output_known: Whether :meth:`knowing` will give y back to the backward. Then z is not kept, but for dropout.
    """

    def __init__(
        self,
        projections: Sequence[Projection],
        dtype: torch.dtype,
        ops: OpTable,
        weights: KeptWeights | None = None,
    ) -> None:
        super().__init__(projections, dtype, ops, weights=weights)

    def tensors(self) -> list[torch.Tensor | None]:
        return [*super().tensors(), *(p.magnitude for p in self.projections)]

    # --- forward --------------------------------------------------------------------------------------------------

    def adapters(self, x: torch.Tensor) -> Kept:
        """Also the scales, and z where it is kept."""
        if self.adapted.dropout:
            return self._dropped(x)
        kept, parts = self._scaled(x)
        return kept if self.output_known else kept._replace(output=self._base(x, kept, parts))

    def matrices(self) -> Kept | None:
        return None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        if self.adapted.dropout:
            return super().forward(x)
        kept, parts = self._scaled(x)
        if self.output_known:
            return self._biased(self._output(x, kept, parts), 1.0), kept
        z = self._base(x, kept, parts)
        return self._biased(self._columns(z, _row(kept, 0)), 1.0), kept._replace(output=z)

    def products(
        self, x: torch.Tensor, kept: Kept, out: torch.Tensor | None = None, factor: float = 1.0
    ) -> torch.Tensor:
        scale, z = _row(kept, 0), kept.output
        if z is None:
            return self._biased(self._added(out, self._output(x, kept, self._weights()), factor), factor)
        if self.adapted.dropout:
            y = self._columns(z, scale)
            self._add_undropped(y, x, kept)
            return self._biased(self._added(out, y, factor), factor)
        if out is not None:
            self.ops.scaling.scale_columns(z, scale, out, factor, True)
            return self._biased(out, factor)
        return self._biased(self._columns(z, scale, factor=factor), factor)

    def onto(self, start: torch.Tensor, x: torch.Tensor, kept: Kept, factor: float) -> torch.Tensor:
        return self.products(x, kept, start.clone(), factor)

    def knowing(self, kept: Kept, output: torch.Tensor) -> Kept:
        """``kept`` with y [tokens, out_features], from which z follows."""
        return kept if self.adapted.dropout else kept._replace(output=output)

    def _scaled(self, x: torch.Tensor) -> tuple[Kept, list[Weight]]:
        """What the backward keeps, but for z, and the weights that were read for it."""
        kept, parts = super().adapters(x), self._weights()
        return kept._replace(scale=self._scales(parts, kept)), parts

    def _base(self, x: torch.Tensor, kept: Kept, parts: list[Weight]) -> torch.Tensor:
        """z [tokens, out_features]."""
        z = torch.empty(x.shape[0], self.out_features, dtype=self.dtype, device=x.device)
        start = self.adapted.add(z, kept, False, 1.0)
        for weight, rows, _ in parts:
            add_product(z[:, rows], x, weight.t(), 1.0 if start else 0.0, 1.0)
        return z

    def _output(self, x: torch.Tensor, kept: Kept, parts: list[Weight]) -> torch.Tensor:
        """c · z [tokens, out_features] where nobody needs z: of z and the decoded weights the smaller is scaled."""
        scale = _row(kept, 0)
        if len(x) > self.in_features and all(decoded for _, _, decoded in parts):
            assert kept.b is not None
            for weight, rows, _ in parts:
                self._rows(weight, scale[rows], weight)
            return self._base(x, kept._replace(b=self._rows(kept.b, scale)), parts)
        z = self._base(x, kept, parts)
        return self._columns(z, scale, z)

    def _columns(
        self, x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None, factor: float = 1.0
    ) -> torch.Tensor:
        """factor · x with scaled columns, in ``out`` (which may be x) or a new tensor."""
        out = torch.empty(x.shape, dtype=self.dtype, device=x.device) if out is None else out
        self.ops.scaling.scale_columns(x, scale, out, factor)
        return out

    def _rows(self, x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x with scaled rows, in ``out`` (which may be x) or a new tensor."""
        out = torch.empty(x.shape, dtype=self.dtype, device=x.device) if out is None else out
        self.ops.scaling.scale_rows(x, scale, out)
        return out

    def _scales(self, parts: list[Weight], kept: Kept) -> torch.Tensor:
        """(c, n) [2, out_features] fp32; c and n are 1 in rows without magnitudes."""
        assert kept.a is not None
        assert kept.b is not None
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        s = self.adapted.scaling
        b = kept.b.to(wide, copy=s is None)
        if s is None:  # a factor per projection: in its columns of B
            for block in self.adapted.blocks:
                b[:, block.columns].mul_(block.projection.scaling)
            s = 1.0
        wa = [mm(weight.matrix, kept.a.t(), wide) for weight in parts]
        product = wa[0] if len(wa) == 1 else torch.cat(wa)
        add_product(product, b, mm(kept.a, kept.a.t(), wide), 2.0, s)  # 2 W Aᵀ + s B A Aᵀ
        change = product.mul_(b).sum(1)
        magnitudes = [b.new_ones(p.shape[0]) if p.magnitude is None else p.magnitude.detach() for p in self.projections]
        scale = torch.cat([*(m.to(wide) for m in magnitudes), self._squares(parts, wide)]).view(2, -1)
        n = scale[1].add_(change, alpha=s).clamp_min_(0).sqrt_()
        row = 0
        for p in self.projections:
            if p.magnitude is None:
                n[row : row + p.shape[0]] = 1.0
            row += p.shape[0]
        scale[0].div_(n)
        return scale

    def _squares(self, parts: list[Weight], wide: torch.dtype) -> torch.Tensor:
        """||W||² of the rows [out_features]: they are those of frozen weights, and taken again where those change."""
        owner = self.projections[0].owner
        device = parts[0].matrix.device
        # A recorded graph neither reads what this may free later, nor leaves here what lies in its own memory.
        if torch.compiler.is_compiling() or recording(device) or ahead.going():
            owner = None
        state = self.stored_state() if owner is not None else []
        known = None if owner is None else _norms.get(owner)
        if known is not None and known.state == state and known.dtype == self.dtype:
            return known.squares
        squares = torch.empty(self.out_features, dtype=wide, device=device)
        for weight, rows, _ in parts:
            torch.linalg.vector_norm(weight, dim=1, dtype=wide, out=squares[rows])
        squares.square_()
        if owner is not None:
            _norms[owner] = Norms(self.dtype, state, squares)
        return squares

    # --- dropout --------------------------------------------------------------------------------------------------

    def _dropped(self, x: torch.Tensor) -> Kept:
        """With dropout every adapter has an input of its own, so each projection is computed alone."""
        kept = super().adapters(x)
        parts = self._weights()
        z = torch.empty(x.shape[0], self.out_features, dtype=self.dtype, device=x.device)
        kept = kept._replace(scale=self._scales(parts, kept))
        self.adapted.add(z.zero_(), kept, True, 1.0)
        for weight, rows, mask, p in self._each(parts, kept.masks):
            add_product(z[:, rows], undrop(x, mask, p.dropout), weight.t(), 1.0, 1.0)
        return kept._replace(output=z)

    def _each(
        self, parts: list[Weight], masks: Sequence[torch.Tensor | None]
    ) -> list[tuple[torch.Tensor, slice, torch.Tensor | None, Projection]]:
        """(weight, rows of y, dropout mask, projection) of every projection."""
        mask_of = {id(block.projection): mask for block, mask in zip(self.adapted.blocks, masks)}
        found, row = [], 0
        for p in self.projections:
            rows = slice(row, row + p.shape[0])
            weight, whole = next((w, r) for w, r, _ in parts if r.start <= rows.start and rows.stop <= r.stop)
            found.append((weight[rows.start - whole.start : rows.stop - whole.start], rows, mask_of.get(id(p)), p))
            row += p.shape[0]
        return found

    def _add_undropped(self, y: torch.Tensor, x: torch.Tensor, kept: Kept) -> None:
        for weight, rows, mask, p in self._each(self._weights(), kept.masks):
            if mask is not None:
                add_product(y[:, rows], x - undrop(x, mask, p.dropout), weight.t(), 1.0, 1.0)

    # --- backward -------------------------------------------------------------------------------------------------

    def input_gradient(
        self,
        g: torch.Tensor,
        kept: Kept,
        needs_dx: bool,
        needs: Sequence[bool],
        hands_on: bool = False,
        rstd: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, FromOutput | None]:
        scale = _row(kept, 0)
        assert kept.b is not None
        found = self.adapted.from_output(g, kept._replace(b=self._rows(kept.b, scale)), needs, rstd)
        if found is None or not needs_dx:
            return None, found
        gb = found.gb
        if self.adapted.dropout:
            return self._dropped_dx(g, gb, kept), found
        scale_weight = len(g) > self.in_features  # which is smaller than g then
        dx = self.adapted.dx(gb, kept)
        for weight, rows, decoded in self._weights():
            if scale_weight:
                add_product(dx, g[:, rows], self._rows(weight, scale[rows], weight if decoded else None), 1.0, 1.0)
            else:
                add_product(dx, self._columns(g[:, rows], scale[rows]), weight, 1.0, 1.0)
        return dx, found

    def _dropped_dx(self, g: torch.Tensor, gb: torch.Tensor, kept: Kept) -> torch.Tensor:
        scale = _row(kept, 0)
        dx = self.adapted.dx(gb, kept)
        for weight, rows, mask, p in self._each(self._weights(), kept.masks):
            part = g[:, rows]
            if mask is None:
                add_product(dx, self._columns(part, scale[rows]), weight, 1.0, 1.0)
            else:
                add_product(dx, part, weight, 1.0, 1.0)
                dx.add_(undrop(self._columns(part, scale[rows] - 1) @ weight, mask, p.dropout))
        return dx

    def parameter_gradients(
        self,
        g: torch.Tensor,
        found: FromOutput | None,
        x: torch.Tensor | Normed | None,
        kept: Kept,
        needs: Sequence[bool],
    ) -> Grads:
        count = PER_PROJECTION * len(self.projections)
        grads = super().parameter_gradients(g, found, x, kept, needs[:count])
        scale, norm = _row(kept, 0), _row(kept, 1)
        for block in self.adapted.blocks:
            i = next(i for i, p in enumerate(self.projections) if p is block.projection) * PER_PROJECTION + 3
            grad = grads[i]
            if grad is not None:
                grads[i] = grad.mul_(scale[block.rows, None])
        grads += [None] * len(self.projections)
        if any(needs[count:]):
            self._magnitude_gradients(g[:, : self.out_features], kept, norm, needs[count:], grads)
        return grads

    def _magnitude_gradients(
        self, g: torch.Tensor, kept: Kept, norm: torch.Tensor, needs: Sequence[bool], grads: Grads
    ) -> None:
        assert kept.output is not None
        known = self.output_known and not self.adapted.dropout  # then kept.output is y = c z + bias
        dots = self.ops.column_dots.column_dots(g, kept.output)
        if not known:
            dots = dots / norm
        row = 0
        for i, p in enumerate(self.projections):
            rows = slice(row, row + p.shape[0])
            row += p.shape[0]
            if p.magnitude is None or not needs[i]:
                continue
            part = dots[rows]
            if known:
                if p.bias is not None:
                    part = part - p.bias.detach() * g[:, rows].sum(0, dtype=part.dtype)
                part = part / p.magnitude.detach()
            grads[PER_PROJECTION * len(self.projections) + i] = part.to(p.magnitude.dtype)


def _row(kept: Kept, i: int) -> torch.Tensor:
    assert kept.scale is not None
    return kept.scale[i]


__all__ = ["DoraGroup"]
