"""What a gated MLP computes on some rows of its input, forward and backward: see ``gated_mlp.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastplug.ops.lora.adapted_unit import UnitGradients, base_product, one_pass
from fastplug.ops.lora.attention_input import projections_input, rstd_of_unmade
from fastplug.ops.lora.group import Grads, Kept

if TYPE_CHECKING:
    from fastplug.ops.lora.gated_mlp import GatedMLP


def normalized(
    spec: GatedMLP, rows: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The input of gate and up, rows + residual, and 1/rms."""
    if spec.norm is None:
        return rows.to(spec.gate_up.dtype), rows, None
    normed, h, rstd = spec.gate_up.ops.rms_norm.forward(
        rows, weight, spec.norm.eps, residual=residual, out_dtype=spec.gate_up.dtype, **spec.norm.kwargs()
    )
    return normed, h, rstd


def backward(
    spec: GatedMLP,
    g: torch.Tensor,
    h: torch.Tensor,
    rstd: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    gate_up: torch.Tensor | None,
    kept: tuple[Kept, Kept] | None,
    stream: torch.Tensor | None,
    needs: tuple[bool, ...],
    last: bool = False,
    base_only: bool = False,
    hands_on: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, Grads]:
    """The gradients of x + residual [rows, hidden], of the norm's weight, and of all projections' tensors.

    Args:
        spec: The node's.
        g: The gradient of the MLP's output [rows, hidden].
        h: x + residual [rows, hidden].
        rstd, gate_up, kept: What the forward kept, None to compute it again; rstd and kept only with gate_up.
        norm_weight: [hidden] or None.
        stream: The gradient that h has from elsewhere [rows, hidden], or None.
        needs: Which arguments of the node need a gradient.
        last: Whether nobody reads gate_up any more: then its gradient is written over it.
        base_only: Whether gate_up is without its adapters' share.
        hands_on: Whether decoded weights may stay for the next forward.
    """
    ops, inner = spec.gate_up.ops, 4 + len(spec.gate_up.tensors())
    g = g.to(spec.gate_up.dtype)
    if spec.factor != 1.0:
        g = g * spec.factor
    overwrite, late = last or gate_up is None, kept is None
    if gate_up is None:
        gate_up, rstd, kept = _recomputed(spec, h, norm_weight, kept, base_only)
    assert kept is not None
    found, left = None, rstd_of_unmade(spec.gate_up, h, rstd, needs[4:inner])
    if base_only:
        out = gate_up if overwrite else torch.empty_like(gate_up)
        found = one_pass(spec, g, gate_up, kept, needs[inner:], out, hands_on, left)
        if found is None:
            gate_up = gate_up if overwrite else gate_up.clone()
            spec.gate_up.add_output_share(gate_up, kept[0])
    gate_up_kept = spec.gate_up.knowing(kept[0], gate_up)
    if found is None:
        found = _one_by_one(spec, g, gate_up, kept[1], needs[inner:], overwrite, late, hands_on)
    del gate_up

    needs_dx, known = needs[1] or needs[2] or needs[3], found.from_gate_up
    if known is None:
        d_normed, known = spec.gate_up.input_gradient(
            found.gate_up, gate_up_kept, needs_dx, needs[4:inner], hands_on, left
        )
    else:
        d_normed = spec.gate_up.dx(found.gate_up, known.gb, gate_up_kept, hands_on) if needs_dx else None
    entered = projections_input(spec.norm, spec.gate_up, h, rstd, norm_weight, needs[4:inner])
    gate_up_grads = spec.gate_up.parameter_gradients(found.gate_up, known, entered, gate_up_kept, needs[4:inner])
    down_grads = found.down
    del found, entered
    d_norm_weight = None
    if spec.norm is not None and d_normed is not None:
        d_normed, d_norm_weight = ops.rms_norm.backward(
            d_normed, h, rstd, norm_weight, dh=stream, weight_grad=needs[3], **spec.norm.kwargs()
        )
    return d_normed, d_norm_weight, [*gate_up_grads, *down_grads]


def _one_by_one(
    spec: GatedMLP,
    g: torch.Tensor,
    gate_up: torch.Tensor,
    down_kept: Kept,
    needs: tuple[bool, ...],
    overwrite: bool,
    late: bool,
    hands_on: bool,
) -> UnitGradients:
    """The gradients of gate and up, and of down's tensors, in a pass for each product.

    Args:
        spec, g, gate_up: As of :func:`backward`.
        down_kept: What down keeps, of x Aᵀ nothing if ``late``.
        needs: Which of down's tensors need a gradient.
        overwrite: Whether gate_up may be written over.
        late: Whether x Aᵀ of down is still to be made.
        hands_on: As of :func:`backward`.
    """
    # The activation is needed by dA of down; it comes out of the pass that makes the gradients of gate and up.
    hidden, known = spec.down.input_gradient(g, down_kept, True, needs, hands_on)
    assert hidden is not None
    compiling = torch.compiler.is_compiling()  # a custom op must not write what it reads there
    overwrite = overwrite and not compiling and not spec.gate_up.output_known
    d_gate_up = gate_up if overwrite else torch.empty_like(gate_up)
    (gate, up), (d_gate, d_up) = gate_up.split(spec.widths, dim=-1), d_gate_up.split(spec.widths, dim=-1)
    d_hidden = hidden
    if any(needs) and compiling:
        hidden = torch.empty_like(d_hidden)
    spec.gate_up.ops.glu.backward(d_hidden, gate, up, spec.activation, d_gate, d_up, hidden if any(needs) else None)
    if any(needs) and late:
        down_kept = spec.down.adapters(hidden)
    grads = spec.down.parameter_gradients(g, known, hidden if any(needs) else None, down_kept, needs)
    return UnitGradients(d_gate_up, grads)


def _recomputed(
    spec: GatedMLP, h: torch.Tensor, weight: torch.Tensor | None, kept: tuple[Kept, Kept] | None, base_only: bool
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[Kept, Kept]]:
    """Gate and up [rows, 2 width], 1/rms, and what the groups keep: of down A and B only, where it was not kept."""
    normed, _, rstd = normalized(spec, h, weight)
    if kept is None:
        nothing = torch.empty(0, spec.down.in_features, dtype=spec.down.dtype, device=h.device)
        kept = spec.gate_up.adapters(normed), spec.down.adapters(nothing)
    return base_product(spec, normed, kept[0], base_only), rstd, kept
