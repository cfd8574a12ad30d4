"""A gated MLP with its norm and residual adds as one node.

h = x + residual, n = norm(h), out = h + factor · down(act(gate(n)) · up(n)).

Kept for the backward: h, its 1/rms, gate and up. The normalised input and the activation are computed again, each in
the pass that needs it anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastplug.ops.lora.attention_input import Norm
from fastplug.ops.lora.group import Group, Kept
from fastplug.ops.recompute import tensors_left


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
    """

    gate_up: Group
    down: Group
    activation: str
    norm: Norm | None = None
    factor: float = 1.0
    joined: bool = True

    @property
    def widths(self) -> list[int]:
        """Channels of gate and up."""
        widths = [p.shape[0] for p in self.gate_up.projections]
        return widths if len(widths) == 2 else [widths[0] // 2] * 2


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
        ops, dtype = spec.gate_up.ops, spec.gate_up.dtype
        rows = x.reshape(-1, spec.gate_up.in_features)
        rstd = None
        if spec.norm is None:
            h, normed = rows, rows.to(dtype)
        else:
            residual_rows = None if residual is None else residual.reshape(rows.shape)
            if residual_rows is not None and rows.dtype != residual_rows.dtype:
                rows = rows.to(residual_rows.dtype)  # an fp32 residual stream under autocast
            normed = spec.gate_up.room(len(rows), x.device)
            _, h, rstd = ops.rms_norm.forward(
                rows,
                norm_weight,
                spec.norm.eps,
                residual=residual_rows,
                out=normed[:, : spec.gate_up.in_features],
                **spec.norm.kwargs(),
            )
        gate_up, kept = spec.gate_up.forward(normed)
        del normed
        gate, up = gate_up.split(spec.widths, dim=-1)
        hidden = spec.down.room(len(rows), x.device)
        ops.glu.forward(gate, up, spec.activation, hidden[:, : up.shape[1]])
        ctx.spec, ctx.shapes = spec, (x.shape, x.dtype, None if residual is None else residual.dtype)
        ctx.count = len(kept.tensors())
        down_kept = spec.down.adapters(hidden)
        saved = (h, rstd, norm_weight, gate_up, *kept.tensors(), *down_kept.tensors())
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        if not spec.joined and spec.norm is not None:
            return torch.ops.aten._unsafe_view(spec.down.products(hidden, down_kept), x.shape), h.view(x.shape)
        if tensors_left() == sum(tensor is not None for tensor in saved):
            return torch.empty_like(h).view(x.shape)  # recomputed for what it saves: nobody reads the output
        start = h.clone() if spec.norm is not None and h.dtype == dtype else None
        out = spec.down.products(hidden, down_kept, out=start, factor=spec.factor)
        if spec.norm is not None and start is None:
            out = h + out
        return torch.ops.aten._unsafe_view(out, x.shape)  # no view: FSDP2 warns of modules that return one

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None, dh: torch.Tensor | None = None) -> tuple[Any, ...]:
        spec: GatedMLP = ctx.spec
        ops, dtype = spec.gate_up.ops, spec.gate_up.dtype
        h, rstd, norm_weight, gate_up, *rest = ctx.saved_tensors
        kept, down_kept = Kept.of(rest[: ctx.count]), Kept.of(rest[ctx.count :])
        needs = ctx.needs_input_grad
        shape, x_dtype, residual_dtype = ctx.shapes
        inner = 4 + len(spec.gate_up.tensors())
        needs_input = needs[1] or needs[2] or needs[3]

        stream = None if dh is None else dh.reshape(h.shape)
        if g is None:  # nobody used the MLP's output
            dx = None if stream is None else stream.view(shape)
            d_residual = dx.to(residual_dtype) if dx is not None and needs[2] else None
            return None, dx.to(x_dtype) if dx is not None else None, d_residual, *([None] * (len(needs) - 3))
        g = g.reshape(h.shape)
        if spec.joined:
            stream = g
        g = g.to(dtype)
        if spec.factor != 1.0:
            g = g * spec.factor
        gate, up = gate_up.split(spec.widths, dim=-1)
        # The activation is needed by dA of down; it comes out of the pass that makes the gradients of gate and up.
        d_hidden, gb = spec.down.input_gradient(g, down_kept, True)
        assert d_hidden is not None
        d_gate_up = spec.gate_up.gradient_room(len(g), g.device)
        d_gate, d_up = d_gate_up[:, : spec.gate_up.out_features].split(spec.widths, dim=-1)
        hidden = torch.empty_like(d_hidden) if any(needs[inner:]) else None
        ops.glu.backward(d_hidden, gate, up, spec.activation, d_gate, d_up, hidden)
        del d_hidden
        down_grads = spec.down.parameter_gradients(g, gb, hidden, down_kept, needs[inner:])
        del hidden

        d_normed, gb = spec.gate_up.input_gradient(d_gate_up, kept, needs_input)
        normed = None
        if any(needs[4:inner]):
            normed = h.to(dtype)
            if spec.norm is not None:
                normed, _, _ = ops.rms_norm.forward(
                    h, norm_weight, spec.norm.eps, out_dtype=dtype, **spec.norm.kwargs()
                )
        gate_up_grads = spec.gate_up.parameter_gradients(d_gate_up, gb, normed, kept, needs[4:inner])
        del d_gate_up
        dx, d_norm_weight = d_normed, None
        if spec.norm is not None and d_normed is not None:
            dx, d_norm_weight = ops.rms_norm.backward(
                d_normed, h, rstd, norm_weight, dh=stream, weight_grad=needs[3], **spec.norm.kwargs()
            )
        dx = None if dx is None else dx.view(shape)
        d_residual = dx.to(residual_dtype) if dx is not None and needs[2] and residual_dtype is not None else None
        d_input = dx.to(x_dtype) if dx is not None and needs[1] else None
        return None, d_input, d_residual, d_norm_weight, *gate_up_grads, *down_grads
