"""The products of several projections that read one tensor: forward and backward, on plain tensors.

Base weights are decoded into a buffer with room for the adapters: B beside W in the forward, A below it in the
backward. With x Aᵀ beside x (and g B beside g), one product computes base and adapters, y = [x, x Aᵀ] [W, B]ᵀ and
dx = [g, g B] [W; A], and saves writing y once and reading it twice (and dx). That needs x (and g) to lie in a buffer
with room behind its rows, which :meth:`Group.room` and :meth:`Group.gradient_room` give. Weights stored densely are
copied into such a buffer where there are tokens enough to pay for it; else the base product accumulates onto the
adapters' own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastplug.ops.lora.adapters import Adapters
from fastplug.ops.lora.fp8_base import Fp8
from fastplug.ops.lora.matmul import mm
from fastplug.ops.lora.projection import PER_PROJECTION, Grads, Kept, Projection
from fastplug.ops.table import OpTable

# What a product sums over comes in multiples of this: on an H100 one over 4096 + 64 channels takes as long as one over
# 4096, one over 4096 + 32 takes 8% longer.
WIDTH = 64
# Copying a dense weight [N, K] moves 2 N K elements, adapters of their own about 2.4 tokens · N: with twice as many
# tokens as K, the copy costs less than half.
TOKENS_PER_CHANNEL = 2


class Group:
    """Projections of one tensor x [tokens, in_features], computed in one dtype.

    Attributes:
        output_known: Whether a backward of the group reads y, which its node keeps and gives it by :meth:`knowing`.
    """

    output_known = False

    def __init__(
        self, projections: Sequence[Projection], dtype: torch.dtype, ops: OpTable, fp8: Fp8 | None = None
    ) -> None:
        self.projections = projections
        self.dtype = dtype
        self.ops = ops
        self.out_features = sum(p.shape[0] for p in projections)
        self.in_features = projections[0].shape[1]
        self.adapted = Adapters(projections, dtype)
        self.fp8 = fp8 if fp8 is not None and fp8.covers(self) else None

    def tensors(self) -> list[torch.Tensor | None]:
        return [tensor for p in self.projections for tensor in p.tensors]

    # --- room for the adapters ------------------------------------------------------------------------------------

    def room(self, tokens: int, device: torch.device) -> torch.Tensor:
        """An empty buffer [tokens, in_features (+ room)]: write x into its first ``in_features`` columns.

        :meth:`forward` and :meth:`products` take the whole buffer in place of x.
        """
        extra = 0 if self.fp8 is not None and self.fp8.forward else self._extra(tokens, self.in_features, device)
        return torch.empty(tokens, self.in_features + extra, dtype=self.dtype, device=device)

    def gradient_room(self, tokens: int, device: torch.device) -> torch.Tensor:
        """An empty buffer [tokens, out_features (+ room)]: write g into its first ``out_features`` columns.

        :meth:`input_gradient` takes the whole buffer in place of g.
        """
        separate = self.adapted.dropout or self.fp8 is not None
        extra = 0 if separate else self._extra(tokens, self.out_features, device)
        return torch.empty(tokens, self.out_features + extra, dtype=self.dtype, device=device)

    def _extra(self, tokens: int, channels: int, device: torch.device) -> int:
        """How many columns are for the adapters beside ``channels``, 0 where they are not folded into the product."""
        if not self.adapted.rank or not folding(device) or self.dtype.itemsize != 2 or channels % WIDTH:
            return 0
        decoded = any(not p.read().stored_densely for p in self.projections)
        return -(-self.adapted.rank // WIDTH) * WIDTH if decoded or tokens >= TOKENS_PER_CHANNEL * channels else 0

    # --- forward --------------------------------------------------------------------------------------------------

    def adapters(self, x: torch.Tensor) -> Kept:
        """The skinny part of the forward: everything that the backward keeps. Fills the room beside x, if there is."""
        kept = self.adapted.forward(x[:, : self.in_features])
        if x.shape[1] > self.in_features and kept.xa is not None:
            fill(x[:, self.in_features :], kept.xa)
        return kept

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Kept]:
        """y [tokens, out_features] for x in the compute dtype, and what the backward needs.

        x is [tokens, in_features], or a buffer of :meth:`room`.
        """
        kept = self.adapters(x)
        return self.products(x, kept), kept

    def products(
        self, x: torch.Tensor, kept: Kept, out: torch.Tensor | None = None, factor: float = 1.0
    ) -> torch.Tensor:
        """factor · y, given :meth:`adapters`; added in place to ``out`` (of the compute dtype), if that is given."""
        base = None if self.fp8 is None else self.fp8.output(self, x[:, : self.in_features])
        if base is not None:
            self._add_low_rank(base, kept)
            out = base if out is None and factor == 1.0 else self._added(out, base, factor)
            return self._biased(out, factor)
        start = out is not None  # whether out already holds something to add to
        if out is None:
            out = torch.empty(x.shape[0], self.out_features, dtype=self.dtype, device=x.device)
        if x.shape[1] > self.in_features:
            assert kept.b is not None
            weight = self.decoded(beside=kept.b, room=x.shape[1] - self.in_features)
            out.addmm_(x, weight.t(), beta=1 if start else 0, alpha=factor)
        else:
            start = self.adapted.add(out, kept, start, factor)
            for weight, rows in self._weights():
                out[:, rows].addmm_(x, weight.t(), beta=1 if start else 0, alpha=factor)
        return self._biased(out, factor)

    def _add_low_rank(self, y: torch.Tensor, kept: Kept) -> None:
        """Add the adapters' share to ``y`` in place."""
        if kept.xa is None or kept.b is None:
            return
        for rows, columns in self.adapted.tiles(y):
            self.ops.low_rank.add(y[:, rows], kept.xa[:, columns], kept.b[rows, columns])

    @staticmethod
    def _added(out: torch.Tensor | None, base: torch.Tensor, factor: float) -> torch.Tensor:
        return base.mul_(factor) if out is None else out.add_(base, alpha=factor)

    def _biased(self, out: torch.Tensor, factor: float) -> torch.Tensor:
        row = 0
        for p in self.projections:
            if p.bias is not None:
                out[:, row : row + p.shape[0]].add_(p.bias.detach(), alpha=factor)
            row += p.shape[0]
        return out

    # --- backward -------------------------------------------------------------------------------------------------

    def input_gradient(
        self, g: torch.Tensor, kept: Kept, needs_dx: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The gradient of x (None if not wanted) and s · g B [tokens, rank].

        g is [tokens, out_features], or a buffer of :meth:`gradient_room`.
        """
        given, g = g, g[:, : self.out_features]
        gb = self.adapted.scaled_gb(g, kept)
        if not needs_dx:
            return None, gb
        if self.fp8 is not None:
            base = self.fp8.input_gradient(self, g)
            return base if gb is None else self._add_dx(base, gb, kept), gb
        room = given if given.shape[1] > self.out_features else self._moved(g)
        if room is not None and gb is not None:
            fill(room[:, self.out_features :], gb)
            return room @ self.decoded(below=kept.a, room=room.shape[1] - self.out_features), gb
        dx = None if gb is None else self.adapted.dx(gb, kept)
        start = dx is not None
        if dx is None:
            dx = torch.empty(g.shape[0], self.in_features, dtype=self.dtype, device=g.device)
        for weight, rows in self._weights():
            dx.addmm_(g[:, rows], weight, beta=1 if start else 0)
            start = True
        return dx, gb

    def _moved(self, g: torch.Tensor) -> torch.Tensor | None:
        """g in a buffer with room, where copying it is cheaper than to write dx and read it twice; else None."""
        if self.out_features >= self.in_features:
            return None
        room = self.gradient_room(len(g), g.device)
        if room.shape[1] == self.out_features:
            return None
        room[:, : self.out_features].copy_(g)
        return room

    def knowing(self, kept: Kept, output: torch.Tensor) -> Kept:
        """``kept``, with y [tokens, out_features] where the gradients need it."""
        return kept

    def _add_dx(self, dx: torch.Tensor, gb: torch.Tensor, kept: Kept) -> torch.Tensor:
        """Add the adapters' share to ``dx`` in place."""
        assert kept.a is not None
        if self.adapted.dropout:
            return dx.add_(self.adapted.dx(gb, kept))
        self.ops.low_rank.add(dx, gb, kept.a.t())
        return dx

    def parameter_gradients(
        self, g: torch.Tensor, gb: torch.Tensor | None, x: torch.Tensor | None, kept: Kept, needs: Sequence[bool]
    ) -> Grads:
        """Gradients of :meth:`tensors` where ``needs`` is true; ``x`` may be None if none of them is."""
        grads: Grads = [None] * len(needs)
        x = None if x is None else x[:, : self.in_features]
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
            self.adapted.parameter_gradients(g, gb, x, kept, needs, grads)
        return grads

    # --- base weights ---------------------------------------------------------------------------------------------

    def decoded(
        self, beside: torch.Tensor | None = None, below: torch.Tensor | None = None, room: int = 0
    ) -> torch.Tensor:
        """All weights in one buffer, with B [out_features, rank] beside or A [rank, in_features] below, and zeros.

        ``room`` is how many columns or rows there are for B or A.
        """
        encoded = [p.read() for p in self.projections]
        rows, columns = (room, 0) if beside is None else (0, room)
        shape = (self.out_features + rows, self.in_features + columns)
        buffer = torch.empty(shape, dtype=self.dtype, device=encoded[0].tensors[0].device)
        row = 0
        for weight in encoded:
            whole = weight.shape == shape
            target = buffer if whole else buffer[row : row + weight.shape[0], : self.in_features]
            weight.decode(target, self.ops)
            row += weight.shape[0]
        if beside is not None:
            fill(buffer[:, self.in_features :], beside)
        if below is not None:
            fill(buffer[self.out_features :].t(), below.t())
        return buffer

    def _weights(self) -> list[tuple[torch.Tensor, slice]]:
        """Dense weights in the compute dtype with their rows of y: one for all that had to be decoded together."""
        encoded = [p.read() for p in self.projections]
        if any(not weight.stored_densely for weight in encoded) and encoded[0].tensors[0].device.type != "cpu":
            return [(self.decoded(), slice(0, self.out_features))]  # a CPU gains nothing by one product
        parts, row = [], 0
        for weight in encoded:
            matrix = weight.dense(self.dtype)
            if matrix is None:
                matrix = torch.empty(weight.shape, dtype=self.dtype, device=weight.tensors[0].device)
                weight.decode(matrix, self.ops)
            parts.append((matrix, slice(row, row + len(matrix))))
            row += len(matrix)
        return parts


def fill(room: torch.Tensor, values: torch.Tensor) -> None:
    """Write ``values`` into the first columns of ``room``, zeros into the others."""
    width = values.shape[1]
    room[:, :width].copy_(values)
    if width < room.shape[1]:
        room[:, width:].zero_()


def folding(device: torch.device) -> bool:
    """Whether folding the adapters into the base product pays: it saves memory traffic, of which a CPU has enough."""
    return device.type != "cpu"


__all__ = ["Grads", "Group", "Kept", "Projection"]
