"""A gated MLP with its norm and residual adds as one node.

h = x + residual, n = norm(h), out = h + factor · down(act(gate(n)) · up(n)).

Kept for the backward: h, its 1/rms, gate and up. The activation is computed again in a pass that is needed anyway, and
so is the normalised input where more than the gradients of A need it. Where memory is short, gate and up are computed
again too (``keep_gate_up=False``: the same products of the same operands, so the same bits), or the rows go through in
tiles (``tile_rows``), so that gate, up and the activation never exist for the whole sequence; then only h is kept, and
the gradients of the tiles are summed in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastplug.ops.lora.adapted_unit import Unit
from fastplug.ops.lora.attention_input import Norm
from fastplug.ops.lora.gated_mlp_rows import backward, normalized
from fastplug.ops.lora.gated_mlp_tiles import backward_in_tiles, forward_in_tiles
from fastplug.ops.lora.group import Group, Kept
from fastplug.ops.recompute import graph_goes, handover, nodes_stay, tensors_left


@dataclass(frozen=True)
class GatedMLP:
    """What the node needs beside tensors.

    Attributes:
        gate_up: The gate and up projections, in that order, or the one that makes both.
        down: The down projection, a group of one.
        activation: ``silu``, ``gelu`` or ``gelu_tanh``.
        norm: The norm before gate and up, or None if the input is normalised already (and nothing is added).
        factor: The factor on the MLP's output where h is added to it (Granite's residual multiplier).
        joined: Whether h is added. Else it is returned beside the MLP's output, which another norm goes over first.
        keep_gate_up: Whether gate and up stay for the backward.
        decodes_once: Whether the second pass of gradient checkpointing keeps the decoded weights of gate and up for the
            backward, which follows at once: as much memory as they take, for decoding them twice a step and not thrice.
            Of several MLPs that are computed again together the first one does.
        tile_rows: How many rows (tokens) are computed at once, None for all; several tiles keep no gate and up.
    """

    gate_up: Group
    down: Group
    activation: str
    norm: Norm | None = None
    factor: float = 1.0
    joined: bool = True
    keep_gate_up: bool = True
    decodes_once: bool = False
    tile_rows: int | None = None

    @property
    def widths(self) -> list[int]:
        """Channels of gate and up."""
        widths = [p.shape[0] for p in self.gate_up.projections]
        return widths if len(widths) == 2 else [widths[0] // 2] * 2

    @property
    def drops(self) -> bool:
        """Whether an adapter drops its input."""
        return any(p.dropout for group in (self.gate_up, self.down) for p in group.projections if p.a is not None)

    def tiles(self, rows: int) -> list[slice]:
        """The rows of each tile, at least one tile."""
        if self.tile_rows is None or rows <= self.tile_rows:
            return [slice(0, rows)]  # not by a range, which would tie what torch.compile traces to this length
        size = max(1, self.tile_rows)
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def gated_mlp(
    spec: GatedMLP,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
) -> Any:
    """The MLP of x [..., hidden] (without a norm), or of norm(x + residual) with both residual adds (with one).

    Returns [..., hidden]: in the residual stream's dtype with a norm, in the compute dtype without. With a norm and
    ``joined=False``: the MLP's output, in the compute dtype, and x + residual.
    """
    tensors = (*spec.gate_up.tensors(), *spec.down.tensors())
    return GatedMLPFunction.apply(spec, x, residual, norm_weight, *tensors)


class GatedMLPFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        spec: GatedMLP,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        norm_weight: torch.Tensor | None,
        *tensors: torch.Tensor | None,
    ) -> Any:
        dtype = spec.gate_up.dtype
        rows = x.reshape(-1, spec.gate_up.in_features)
        residual_rows = None if residual is None else residual.reshape(rows.shape)
        if spec.norm is not None and residual_rows is not None and rows.dtype != residual_rows.dtype:
            rows = rows.to(residual_rows.dtype)  # an fp32 residual stream under autocast
        tiles = spec.tiles(len(rows))
        ctx.spec, ctx.shapes = spec, (x.shape, x.dtype, None if residual is None else residual.dtype)
        ctx.set_materialize_grads(False)
        if len(tiles) > 1:
            h = rows if spec.norm is None or residual_rows is None else rows + residual_rows
            return forward_in_tiles(ctx, spec, h, norm_weight, tiles, x.shape)

        normed, h, rstd = normalized(spec, rows, norm_weight, residual_rows)
        unit = Unit.of(spec, normed)
        del normed
        gate_up, kept = unit.gate_up, unit.kept
        # Under gradient checkpointing x Aᵀ of down stays here, so that the second pass need not make the activation.
        hands = handover() if unit.down is not None and unit.down.a is not None else None
        matrices = unit.down if hands is not None or nodes_stay() else None
        hidden, down_kept = None, matrices
        if down_kept is None:
            hidden, down_kept = unit.result()
        small = (*kept.tensors(), *down_kept.tensors())
        saved = (h, rstd, norm_weight, gate_up if spec.keep_gate_up else None, *kept.base, *small)
        ctx.counts, ctx.base_only = (len(kept.base), len(kept.tensors())), unit.adapted is not None
        ctx.down_xa = hands.take() if hands is not None and hands.takes else None
        ctx.save_for_backward(*saved)
        ctx.hands_on = spec.keep_gate_up and spec.gate_up.may_hand_on(h.numel() + gate_up.numel(), spec.down)
        if (spec.joined or spec.norm is None) and tensors_left() == sum(tensor is not None for tensor in saved):
            return torch.empty_like(h).view(x.shape)  # recomputed for what it saves: nobody reads the output
        if hidden is None:
            hidden, down_kept = unit.result()
            ctx.base_only = unit.adapted is not None
            if ctx.down_xa is None:
                ctx.down_xa = down_kept.xa
                if hands is not None:
                    assert down_kept.xa is not None
                    hands.give(down_kept.xa)
        del gate_up, unit, kept, saved, small
        if not spec.joined and spec.norm is not None:
            return torch.ops.aten._unsafe_view(spec.down.products(hidden, down_kept), x.shape), h.view(x.shape)
        if spec.norm is not None and h.dtype == dtype:
            out = spec.down.onto(h, hidden, down_kept, spec.factor)
        else:
            out = spec.down.products(hidden, down_kept, factor=spec.factor)
            out = out if spec.norm is None else h + out
        return torch.ops.aten._unsafe_view(out, x.shape)  # no view: FSDP2 warns of modules that return one

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None, dh: torch.Tensor | None = None) -> tuple[Any, ...]:
        spec: GatedMLP = ctx.spec
        h, rstd, norm_weight, gate_up, *rest = ctx.saved_tensors
        needs = ctx.needs_input_grad
        shape, x_dtype, residual_dtype = ctx.shapes
        stream = None if dh is None else dh.reshape(h.shape)
        if g is None:  # nobody used the MLP's output
            dx = None if stream is None else stream.view(shape)
            d_residual = dx.to(residual_dtype) if dx is not None and needs[2] else None
            return None, dx.to(x_dtype) if dx is not None else None, d_residual, *([None] * (len(needs) - 3))
        g = g.reshape(h.shape)
        if spec.joined:
            stream = g
        tiles = spec.tiles(len(h))
        if len(tiles) > 1:
            dx, d_norm_weight, grads = backward_in_tiles(ctx, spec, g, h, norm_weight, rest, stream, tiles)
        else:
            bases, count = ctx.counts
            base, rest = tuple(rest[:bases]), rest[bases:]
            kept = (Kept.of(rest[:count])._replace(base=base), Kept.of(rest[count:]))
            if ctx.down_xa is not None:
                kept = kept[0], kept[1]._replace(xa=ctx.down_xa)
            last = graph_goes()
            if last:
                ctx.down_xa = None
            hands_on = last and ctx.hands_on
            if hands_on:
                spec.gate_up.frees(gate_up, spec.down)
            dx, d_norm_weight, grads = backward(
                spec, g, h, rstd, norm_weight, gate_up, kept, stream, needs, last, ctx.base_only, hands_on
            )
        dx = None if dx is None else dx.view(shape)
        d_residual = dx.to(residual_dtype) if dx is not None and needs[2] and residual_dtype is not None else None
        d_input = dx.to(x_dtype) if dx is not None and needs[1] else None
        return None, d_input, d_residual, d_norm_weight, *grads
