"""The gated unit of an MLP: gate and up, and what makes down's input of them and takes their gradients.

Where ``ops/adapted_glu`` suits, one pass each way does all that their adapters and down's ask of tensors of the MLP's
width. Then ``gate_up`` holds what the base weights alone give, from its product to the end of the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastplug.ops.adapted_glu.reference import Adapted
from fastplug.ops.lora.group import FromOutput, Grads, Group, Kept
from fastplug.ops.recompute import first_asking, nodes_stay

if TYPE_CHECKING:
    from fastplug.ops.lora.gated_mlp import GatedMLP


@dataclass
class Unit:
    """Gate and up of some rows.

    Attributes:
        spec: The node's.
        gate_up: [rows, 2 width]; where there is ``adapted``, without their adapters' share.
        kept: What their group keeps.
        down: A and B of down, or None where more of what it keeps follows from its input.
        adapted: What the one pass reads, None where it does not suit.
    """

    spec: GatedMLP
    gate_up: torch.Tensor
    kept: Kept
    down: Kept | None
    adapted: Adapted | None

    @classmethod
    def of(cls, spec: GatedMLP, normed: torch.Tensor) -> Unit:
        """For the input of gate and up [rows, hidden]."""
        down = spec.down.matrices()
        if down is None or type(spec.gate_up) is not Group:
            return cls(spec, *spec.gate_up.forward(normed), down, None)
        kept = spec.gate_up.adapters(normed)
        if spec.decodes_once and nodes_stay() and first_asking():
            kept = kept._replace(base=spec.gate_up.decoded_weights())
        adapted = operands(spec, kept, down)
        if adapted is not None and not spec.down.ops.adapted_glu.suits(len(normed), adapted, spec.activation):
            adapted = None
        return cls(spec, base_product(spec, normed, kept, adapted is not None), kept, down, adapted)

    def result(self) -> tuple[torch.Tensor, Kept]:
        """act(gate) · up [rows, width], and what down keeps."""
        spec = self.spec
        if self.adapted is not None:
            assert self.down is not None
            hidden = _empty(self.gate_up, spec.down.in_features)
            scaling = spec.down.projections[0].scaling
            xa = spec.down.ops.adapted_glu.forward(self.gate_up, self.adapted, spec.activation, hidden, scaling)
            if xa is not None:
                return hidden, self.down._replace(xa=xa)
            self.adapted = None
            spec.gate_up.add_output_share(self.gate_up, self.kept)
        hidden = activated(spec, self.gate_up)
        return hidden, spec.down.adapters(hidden) if self.down is None else spec.down.adapted.forward(hidden, self.down)


def operands(spec: GatedMLP, gate_up: Kept, down: Kept) -> Adapted | None:
    """The adapters as the one pass reads them, from what both groups keep; None where they are of another kind."""
    groups = (spec.gate_up, spec.down)
    if any(type(group) is not Group or group.adapted.dropout for group in groups):
        return None
    if any(p.a is None or p.trained is not None for group in groups for p in group.projections):
        return None
    if gate_up.xa is None or gate_up.b is None or down.a is None or spec.widths != [spec.down.in_features] * 2:
        return None
    columns = [block.columns for block in spec.gate_up.adapted.blocks]
    return Adapted(gate_up.xa, gate_up.b, (columns[0], columns[-1]), down.a)  # the same where one makes both


def base_product(spec: GatedMLP, normed: torch.Tensor, kept: Kept, alone: bool) -> torch.Tensor:
    """Gate and up [rows, 2 width], of the base ``alone`` or with their adapters' share."""
    return spec.gate_up.products(normed, Kept(base=kept.base) if alone else kept)


def activated(spec: GatedMLP, gate_up: torch.Tensor) -> torch.Tensor:
    """act(gate) · up [rows, width]."""
    gate, up = gate_up.split(spec.widths, dim=-1)
    hidden = _empty(gate_up, up.shape[1])
    spec.down.ops.glu.forward(gate, up, spec.activation, hidden)
    return hidden


@dataclass
class UnitGradients:
    """What the unit's backward gives.

    Attributes:
        gate_up: The gradient of gate and up [rows, 2 width].
        down: The gradients of down's tensors.
        from_gate_up: What follows from ``gate_up``, where the one pass has made it.
    """

    gate_up: torch.Tensor
    down: Grads
    from_gate_up: FromOutput | None = None


def one_pass(
    spec: GatedMLP,
    g: torch.Tensor,
    gate_up: torch.Tensor,
    kept: tuple[Kept, Kept],
    needs_down: Sequence[bool],
    out: torch.Tensor,
    hands_on: bool,
    rstd: torch.Tensor | None,
) -> UnitGradients | None:
    """All of it in one pass over gate, up and down's gradient, or None where the device cannot after all.

    Args:
        spec: The node's.
        g: The gradient of down's output [rows, hidden].
        gate_up: What the base alone gave.
        kept: Of both groups.
        needs_down: Which of down's tensors need a gradient.
        out: Where the gradient of gate and up goes, may be ``gate_up``.
        hands_on: As of :func:`fastplug.ops.lora.gated_mlp_rows.backward`.
        rstd: 1/rms of gate's and up's input, if their group will get that unmade.
    """
    adapted, found = operands(spec, *kept), spec.down.adapted.from_output(g, kept[1], needs_down)
    assert adapted is not None
    assert found is not None
    d_hidden = spec.down.dx(g, None, Kept(), hands_on)
    first, last = spec.gate_up.projections[0], spec.gate_up.projections[-1]
    thin = spec.down.ops.adapted_glu.backward(
        d_hidden, found.gb, gate_up, adapted, spec.activation, out, (first.scaling, last.scaling), rstd
    )
    if thin is None:
        return None
    of_a = 2  # the place of A among the tensors of down, the only projection of its group
    others = [need and i != of_a for i, need in enumerate(needs_down)]
    down, a = spec.down.parameter_gradients(g, found, None, kept[1], others), spec.down.projections[0].a
    if needs_down[of_a] and a is not None:
        down[of_a] = thin.a.to(a.dtype)
    b = thin.b if len(spec.gate_up.projections) > 1 else (torch.cat(thin.b),)
    return UnitGradients(out, down, FromOutput(thin.gb, b, thin.normed))


def _empty(like: torch.Tensor, width: int) -> torch.Tensor:
    return torch.empty(len(like), width, dtype=like.dtype, device=like.device)
