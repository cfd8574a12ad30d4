"""The products of several projections that read one tensor: forward and backward, on plain tensors.

y = x Wᵀ + s · (x Aᵀ) Bᵀ for each projection. The base product accumulates onto the adapters', so that adding them costs
no pass over y of its own; likewise in dx = g W + s · (g B) A.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastplug.ops.add_product import add_product
from fastplug.ops.lora.adapters import Adapters
from fastplug.ops.lora.fp8_base import Fp8
from fastplug.ops.lora.kept_weights import Empty, KeptWeights, State, block_size
from fastplug.ops.lora.matmul import joins, mm
from fastplug.ops.lora.projection import PER_PROJECTION, FromOutput, Grads, Kept, Normed, Projection
from fastplug.ops.recompute import checkpointing
from fastplug.ops.table import OpTable

if TYPE_CHECKING:
    from fastplug.quant.codec import EncodedWeight


class Weight(NamedTuple):
    """A dense base weight in the compute dtype, its rows of y, and whether it may be written over: it lies in a buffer
    into which it was decoded for this product alone."""

    matrix: torch.Tensor
    rows: slice
    decoded: bool


class Group:
    """Projections of one tensor x [tokens, in_features], computed in one dtype.

    Attributes:
        output_known: Whether a backward of the group reads y, which its node keeps and gives it by :meth:`knowing`.
    """

    output_known = False

    def __init__(
        self,
        projections: Sequence[Projection],
        dtype: torch.dtype,
        ops: OpTable,
        fp8: Fp8 | None = None,
        weights: KeptWeights | None = None,
    ) -> None:
        self.projections = projections
        self.dtype = dtype
        self.ops = ops
        self.out_features = sum(p.shape[0] for p in projections)
        self.in_features = projections[0].shape[1]
        self.adapted = Adapters(projections, dtype, ops)
        self.weights = weights
        self.fp8 = fp8 if fp8 is not None and fp8.covers(self) else None

    def tensors(self) -> list[torch.Tensor | None]:
        return [tensor for p in self.projections for tensor in p.tensors]

    # --- forward --------------------------------------------------------------------------------------------------

    def adapters(self, x: torch.Tensor) -> Kept:
        """The skinny part of the forward: everything that the backward keeps."""
        return self.adapted.forward(x)

    def matrices(self) -> Kept | None:
        """What :meth:`adapters` keeps but for x Aᵀ, or None where more of it follows from x."""
        return None if self.adapted.dropout else self.adapted.matrices()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        """y [tokens, out_features] for x [tokens, in_features] in the compute dtype, and what the backward needs."""
        kept = self.adapters(x)
        return self.products(x, kept), kept

    def knowing(self, kept: Kept, output: torch.Tensor) -> Kept:
        """``kept``, with y [tokens, out_features] where the gradients need it."""
        return kept

    def products(
        self, x: torch.Tensor, kept: Kept, out: torch.Tensor | None = None, factor: float = 1.0
    ) -> torch.Tensor:
        """factor · y, given :meth:`adapters`; added in place to ``out`` (of the compute dtype), if that is given."""
        base = None if self.fp8 is None else self.fp8.output(self, x, kept)
        if base is not None:
            return self._biased(self._added(out, base, factor), factor)
        start = out is not None  # whether out already holds something to add to
        if out is None:
            out = torch.empty(x.shape[0], self.out_features, dtype=self.dtype, device=x.device)
        return self._based(out, x, kept.base, self.adapted.add(out, kept, start, factor), factor)

    def onto(self, start: torch.Tensor, x: torch.Tensor, kept: Kept, factor: float) -> torch.Tensor:
        """start + factor · y in a new tensor, given :meth:`adapters`.

        ``start`` [tokens, out_features] is of the compute dtype.
        """
        base = None if self.fp8 is None else self.fp8.output(self, x, kept)
        if base is not None:
            return self._biased(torch.add(start, base, alpha=factor), factor)
        if kept.xa is None or kept.b is None:
            return self._based(start.clone(), x, kept.base, True, factor)
        return self._based(self.ops.low_rank.added(start, kept.xa, kept.b, factor), x, kept.base, True, factor)

    def _based(
        self, out: torch.Tensor, x: torch.Tensor, base: tuple[torch.Tensor, ...], start: bool, factor: float
    ) -> torch.Tensor:
        """factor · (x Wᵀ + bias) in ``out``, added to what is there if ``start``; ``base`` as in :class:`Kept`."""
        for weight, rows, _ in self._weights(base):
            add_product(out[:, rows], x, weight.t(), 1.0 if start else 0.0, factor)
        return self._biased(out, factor)

    def add_output_share(self, y: torch.Tensor, kept: Kept) -> None:
        """Add the adapters' share to ``y`` in place."""
        if kept.xa is None or kept.b is None:
            return
        for rows, columns in self.adapted.tiles(y):
            self.ops.low_rank.add(y[:, rows], kept.xa[:, columns], kept.b[rows, columns])

    @staticmethod
    def _added(out: torch.Tensor | None, base: torch.Tensor, factor: float) -> torch.Tensor:
        if out is None:
            return base if factor == 1.0 else base.mul_(factor)
        return out.add_(base, alpha=factor)

    def _biased(self, out: torch.Tensor, factor: float) -> torch.Tensor:
        row = 0
        for p in self.projections:
            if p.bias is not None:
                out[:, row : row + p.shape[0]].add_(p.bias.detach(), alpha=factor)
            row += p.shape[0]
        return out

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
        """The gradient of x (None if not wanted) for g [tokens, out_features], and what else follows from g.

        ``needs`` as of :meth:`parameter_gradients`, which is to come; ``hands_on`` as of :meth:`dx`; ``rstd`` is 1/rms
        [tokens] of the norm that makes x, if :meth:`parameter_gradients` will get x unmade.
        """
        found = self.adapted.from_output(g, kept, needs, rstd)
        return (self.dx(g, None if found is None else found.gb, kept, hands_on) if needs_dx else None), found

    def dx(self, g: torch.Tensor, gb: torch.Tensor | None, kept: Kept, hands_on: bool = False) -> torch.Tensor:
        """The gradient of x, given s · g B; with None for that, the base's alone.

        ``hands_on``: whether decoded weights may stay for the next forward, see :meth:`may_hand_on`.
        """
        if self.fp8 is not None:
            return self.fp8.input_gradient(self, g, gb, kept)
        dx = None if gb is None else self.adapted.dx(gb, kept)
        start = dx is not None
        if dx is None:
            dx = torch.empty(g.shape[0], self.in_features, dtype=self.dtype, device=g.device)
        for weight, rows, _ in self._weights(kept.base, hands_on):
            add_product(dx, g[:, rows], weight, 1.0 if start else 0.0, 1.0)
            start = True
        return dx

    def may_hand_on(self, numbers: int, *others: Group) -> bool:
        """Asked in a forward whose node keeps so many numbers: whether its backward, which frees them, may leave the
        decoded weights of these groups to the next forward. What is computed again keeps nothing from the forward."""
        if self.weights is None or not self.weights.may_be_handed or torch.compiler.is_compiling():
            return False
        again = checkpointing() != "nothing" or torch._C._current_graph_task_id() != -1  # the latter if reentrant
        return not again and numbers >= _numbers(self, *others)

    def frees(self, activation: torch.Tensor, *others: Group) -> None:
        """A backward that may leave the decoded weights of these groups frees this activation at its end."""
        if self.weights is not None:
            size = activation.numel() * activation.element_size()
            self.weights.frees(block_size(size, _numbers(self, *others) * self.dtype.itemsize))

    def add_input_share(self, dx: torch.Tensor, gb: torch.Tensor, kept: Kept) -> None:
        """Add the adapters' share to ``dx`` in place."""
        assert kept.a is not None
        if self.adapted.dropout:
            dx.add_(self.adapted.dx(gb, kept))
        else:
            self.ops.low_rank.add(dx, gb, kept.a.t())

    def parameter_gradients(
        self,
        g: torch.Tensor,
        found: FromOutput | None,
        x: torch.Tensor | Normed | None,
        kept: Kept,
        needs: Sequence[bool],
    ) -> Grads:
        """Gradients of :meth:`tensors` where ``needs`` is true, given what :meth:`input_gradient` has found.

        ``x`` may be None if none of them is, and unmade where :meth:`takes_unmade` says so.
        """
        grads: Grads = [None] * len(needs)
        row = 0
        for i, p in enumerate(self.projections):
            part = g[:, row : row + p.shape[0]]
            if needs[i * PER_PROJECTION]:
                assert isinstance(x, torch.Tensor)
                assert p.trained is not None
                grads[i * PER_PROJECTION] = mm(part.t(), x, p.trained.dtype)
            if needs[i * PER_PROJECTION + 1]:
                assert p.bias is not None
                grads[i * PER_PROJECTION + 1] = part.sum(0, dtype=torch.float32).to(p.bias.dtype)
            row += p.shape[0]
        if found is not None and kept.xa is not None:
            self.adapted.parameter_gradients(g, found, x, kept, needs, grads)
        return grads

    def takes_unmade(self, needs: Sequence[bool]) -> bool:
        """Whether :meth:`parameter_gradients` needs its input for A alone, so that a :class:`Normed` will do.

        Not in fp16: a small gradient times a small 1/rms may be below what it can hold.
        """
        dense = any(needs[i * PER_PROJECTION] for i in range(len(self.projections)))
        return self.dtype != torch.float16 and not dense and not self.adapted.dropout

    # --- base weights ---------------------------------------------------------------------------------------------

    def decoded(self, encoded: Sequence[EncodedWeight] | None = None, empty: Empty = torch.empty) -> torch.Tensor:
        """All weights, read before or now, in one buffer [out_features, in_features] that ``empty`` allocates."""
        encoded = [p.read() for p in self.projections] if encoded is None else encoded
        shape = (self.out_features, self.in_features)
        buffer = empty(shape, dtype=self.dtype, device=encoded[0].tensors[0].device)
        first, row = encoded[0], 0
        if len(encoded) > 1 and all((w.codec, w.layout) == (first.codec, first.layout) for w in encoded):
            together = getattr(first.codec, "decode_all", None)
            if together is not None and together(encoded, buffer, self.ops):
                return buffer
        for weight in encoded:
            end = row + weight.shape[0]
            weight.decode(buffer if weight.shape == shape else buffer[row:end], self.ops)
            row = end
        return buffer

    def stored_state(self) -> State:
        """Where each stored weight lies and which version it is: what is derived from them holds while this does."""
        return _state([p.read() for p in self.projections])

    def decodes_each_time(self) -> bool:
        """Whether every weight has to be decoded for each product."""
        if self.fp8 is not None or (self.weights is not None and self.weights.keep is not False):
            return False
        return not any(p.read().stored_densely for p in self.projections)

    def decoded_weights(self) -> tuple[torch.Tensor, ...]:
        """What :attr:`Kept.base` holds, of a group that :meth:`decodes_each_time`."""
        return tuple(weight.matrix for weight in self._weights())

    def _weights(self, base: tuple[torch.Tensor, ...] = (), hands_on: bool = False) -> list[Weight]:
        """The dense weights: one for all that had to be decoded together. Those of ``base`` are there already."""
        if base:
            ends = [*itertools.accumulate(len(matrix) for matrix in base)]
            return [Weight(m, slice(end - len(m), end), False) for m, end in zip(base, ends)]
        encoded = [p.read() for p in self.projections]
        device = encoded[0].tensors[0].device
        if any(not weight.stored_densely for weight in encoded) and joins(device):
            matrix, own = self._kept(self.projections, encoded, partial(self.decoded, encoded), hands_on)
            return [Weight(matrix, slice(0, self.out_features), own)]
        parts, row = [], 0
        for p, weight in zip(self.projections, encoded):
            stored, own = weight.dense(self.dtype), False
            if stored is None:
                stored, own = self._kept([p], [weight], partial(self._decode, weight), hands_on)
            parts.append(Weight(stored, slice(row, row + len(stored)), own))
            row += len(stored)
        return parts

    def _decode(self, weight: EncodedWeight, empty: Empty) -> torch.Tensor:
        matrix = empty(weight.shape, dtype=self.dtype, device=weight.tensors[0].device)
        weight.decode(matrix, self.ops)
        return matrix

    def _kept(
        self,
        projections: Sequence[Projection],
        encoded: Sequence[EncodedWeight],
        make: Callable[[Empty], torch.Tensor],
        hands_on: bool,
    ) -> tuple[torch.Tensor, bool]:
        """Their decoded weight, kept or made, and whether it may be written over."""
        if self.weights is None:
            return make(torch.empty), True
        owners, device = [p.owner for p in projections], encoded[0].tensors[0].device
        size = sum(weight.shape[0] * weight.shape[1] for weight in encoded) * self.dtype.itemsize
        matrix, kept = self.weights.get(owners, str(self.dtype), partial(_state, encoded), make, device, hands_on, size)
        return matrix, not kept


def _numbers(*groups: Group) -> int:
    """How many numbers the weights of groups have."""
    return sum(group.in_features * group.out_features for group in groups)


def _state(encoded: Sequence[EncodedWeight]) -> State:
    stored = [weight.tensors[0] for weight in encoded]
    return [(tensor.data_ptr(), tensor._version) for tensor in stored]


__all__ = ["FromOutput", "Grads", "Group", "Kept", "Normed", "Projection"]
