"""From the residual stream to rotated queries and keys: norm, q/k/v projections, q/k norm and RoPE as one node.

Kept for the backward: the residual stream and its 1/rms, and q, k, v as attention keeps them (with a q/k norm also
q and k before it). Where the normalised input is needed, it is computed again from the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastplug.ops.adapted_rope.reference import Adapted, Heads
from fastplug.ops.lora.group import Group, Kept, Normed
from fastplug.ops.recompute import graph_goes
from fastplug.ops.rows import copy_rows


@dataclass(frozen=True)
class Norm:
    """The parameters of an RMSNorm but its weight: epsilon, weight offset, and whether the cast precedes the weight."""

    eps: float
    offset: float = 0.0
    cast_first: bool = True

    def kwargs(self) -> dict[str, Any]:
        return {"offset": self.offset, "cast_first": self.cast_first}


def projections_input(
    norm: Norm | None,
    group: Group,
    rows: torch.Tensor,
    rstd: torch.Tensor | None,
    weight: torch.Tensor | None,
    needs: Sequence[bool],
) -> torch.Tensor | Normed | None:
    """What the backward of a group gets as its input: nothing, the rows, those normalised, or what that is made of.

    Args:
        norm: The norm before the group, or None.
        rows: The norm's input [tokens, in_features].
        rstd: Its 1/rms [tokens], None without a norm.
        weight: The norm's, [in_features], or None.
        needs: Which of the group's tensors need a gradient.
    """
    if not any(needs):
        return None
    left = rstd_of_unmade(group, rows, rstd, needs)
    if norm is not None and left is not None:
        return Normed(rows, left, weight, norm.offset)
    return _normed(norm, group, rows, weight)[0]


def rstd_of_unmade(
    group: Group, rows: torch.Tensor, rstd: torch.Tensor | None, needs: Sequence[bool]
) -> torch.Tensor | None:
    """1/rms if the group will get its input unmade, else None; arguments as of :func:`projections_input`."""
    unmade = any(needs) and rows.dtype == group.dtype and group.takes_unmade(needs)
    return rstd if unmade else None


def _normed(
    norm: Norm | None, group: Group, rows: torch.Tensor, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The projections' input in the compute dtype, and 1/rms."""
    if norm is None:
        return rows.to(group.dtype), None
    normed, _, rstd = group.ops.rms_norm.forward(rows, weight, norm.eps, out_dtype=group.dtype, **norm.kwargs())
    return normed, rstd


@dataclass(frozen=True)
class AttentionInput:
    """What the node needs beside tensors.

    Attributes:
        group: The q, k and v projections, in that order.
        head_dim: Width of one head; the numbers of heads follow from the projections' shapes.
        norm: The norm before the projections, or None if the input is normalised already.
        qk_norm: The norm over each query and key head before RoPE, or None.
        widths: How many of the projections' channels are q, k and v; by default each has a projection of its own.
        by_head: Whether a joint projection puts out q, k and v of the first head, then of the second.
        rotate: Whether RoPE is applied; without it there is no ``qk_norm`` either.
        interleaved: Whether RoPE turns neighbouring channels.
    """

    group: Group
    head_dim: int
    norm: Norm | None = None
    qk_norm: Norm | None = None
    widths: tuple[int, int, int] | None = None
    by_head: bool = False
    rotate: bool = True
    interleaved: bool = False


Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attention_input(
    spec: AttentionInput,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B, Hq, S, D], k and v [B, Hk, S, D] and the residual stream, for x [B, S, hidden], cos and sin [1 or B, S, R].

    The residual stream comes back as an output so that its gradient is added inside the norm's backward. Use that
    one, not x.
    """
    q, k, v, *stream = AttentionInputFunction.apply(
        spec, x, cos, sin, norm_weight, q_weight, k_weight, *spec.group.tensors()
    )
    return q, k, v, stream[0] if stream else x


class AttentionInputFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        spec: AttentionInput,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        norm_weight: torch.Tensor | None,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        group, ops = spec.group, spec.group.ops
        rows = x.reshape(-1, group.in_features)
        normed, rstd = _normed(spec.norm, group, rows, norm_weight)
        qkv, kept, turned = _products(spec, normed, cos, sin)
        q, k, v = _heads(spec, qkv, x.shape[:2])
        raw_q = raw_k = None
        if spec.qk_norm is None:
            if spec.rotate and not turned:
                ops.rope.forward(q, k, cos, sin, q, k, interleaved=spec.interleaved)
        else:
            raw_q, raw_k = q, k
            q, k = q.new_empty(q.shape), k.new_empty(k.shape)
            ops.rope.forward(
                raw_q,
                raw_k,
                cos,
                sin,
                q,
                k,
                q_weight=q_weight,
                k_weight=k_weight,
                eps=spec.qk_norm.eps,
                interleaved=spec.interleaved,
                **spec.qk_norm.kwargs(),
            )
        ctx.spec, ctx.hands_on = spec, group.may_hand_on(x.numel() + qkv.numel())
        ctx.save_for_backward(x, rstd, cos, sin, norm_weight, q_weight, k_weight, raw_q, raw_k, *kept.tensors())
        ctx.set_materialize_grads(False)
        heads = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return (*heads, x) if ctx.needs_input_grad[1] else heads

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[Any, ...]:
        spec: AttentionInput = ctx.spec
        group, ops = spec.group, spec.group.ops
        x, rstd, cos, sin, norm_weight, q_weight, k_weight, raw_q, raw_k, *kept = ctx.saved_tensors
        kept = Kept.of(kept)
        needs = ctx.needs_input_grad
        dq, dk, dv = upstream[:3]
        dh = upstream[3] if len(upstream) > 3 else None
        rows = x.reshape(-1, group.in_features)
        dh = None if dh is None else dh.reshape(rows.shape)
        if dq is None and dk is None and dv is None:
            return None, None if dh is None else dh.view(x.shape), *([None] * (len(needs) - 2))

        dqkv = torch.empty(len(rows), group.out_features, dtype=group.dtype, device=x.device)
        dq_out, dk_out, dv_out = _heads(spec, dqkv, x.shape[:2])
        dq = torch.zeros_like(dq_out) if dq is None else dq.transpose(1, 2)
        dk = torch.zeros_like(dk_out) if dk is None else dk.transpose(1, 2)
        copy_rows(dv_out, dv.transpose(1, 2)) if dv is not None else dv_out.zero_()
        dq_weight = dk_weight = None
        if not spec.rotate:
            copy_rows(dq_out, dq)
            copy_rows(dk_out, dk)
        elif spec.qk_norm is None:
            ops.rope.backward(dq, dk, cos, sin, dq_out, dk_out, interleaved=spec.interleaved)
        else:
            dq_weight, dk_weight = ops.rope.backward(
                dq,
                dk,
                cos,
                sin,
                dq_out,
                dk_out,
                q=raw_q,
                k=raw_k,
                q_weight=q_weight,
                k_weight=k_weight,
                eps=spec.qk_norm.eps,
                interleaved=spec.interleaved,
                weight_grad=needs[5] or needs[6],
                **spec.qk_norm.kwargs(),
            )
        hands_on = ctx.hands_on and graph_goes()
        left = rstd_of_unmade(group, rows, rstd, needs[7:])
        d_normed, found = group.input_gradient(dqkv, kept, needs[1] or needs[4], needs[7:], hands_on, left)
        entered = projections_input(spec.norm, group, rows, rstd, norm_weight, needs[7:])
        grads = group.parameter_gradients(dqkv, found, entered, kept, needs[7:])
        del entered
        dx, d_norm_weight = d_normed, None
        if spec.norm is not None and d_normed is not None:
            dx, d_norm_weight = ops.rms_norm.backward(
                d_normed, rows, rstd, norm_weight, dh=dh, weight_grad=needs[4], **spec.norm.kwargs()
            )
        elif dx is not None:
            dx = dx.to(x.dtype) if dh is None else dx + dh
        dx = dx.view(x.shape) if dx is not None and needs[1] else None
        return None, dx, None, None, d_norm_weight, dq_weight, dk_weight, *grads


def _products(
    spec: AttentionInput, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, Kept, bool]:
    """q, k and v in one buffer [tokens, channels], what the backward needs, and whether q and k are turned: where one
    pass suits that adds the adapters' shares as well."""
    group, ops = spec.group, spec.group.ops
    plain = spec.rotate and not spec.interleaved and not spec.by_head and spec.qk_norm is None
    all_adapted = len(group.adapted.blocks) == len(group.projections) == 3
    if not plain or not all_adapted or type(group) is not Group or group.fp8 is not None:
        return *group.forward(normed), False
    kept = group.adapters(normed)
    assert kept.xa is not None
    assert kept.b is not None
    queries, keys, _ = (p.shape[0] // spec.head_dim for p in group.projections)
    first, second, third = (block.columns.stop for block in group.adapted.blocks)
    adapted, heads = Adapted(kept.xa, kept.b, (first, second, third)), Heads(queries, keys, spec.head_dim)
    if not ops.adapted_rope.suits(len(normed), adapted, heads, cos):
        return group.products(normed, kept), kept, False
    qkv = group.products(normed, Kept(base=kept.base))
    ops.adapted_rope.forward(qkv, adapted, heads, cos, sin)
    return qkv, kept, True


def _heads(spec: AttentionInput, qkv: torch.Tensor, shape: tuple[int, ...]) -> Three:
    """Views [B, S, heads, head_dim] of q, k and v in the joint buffer [B·S, out_features]."""
    if spec.by_head:
        q, k, v = qkv.view(*shape, -1, 3, spec.head_dim).unbind(-2)
        return q, k, v
    widths = spec.widths or [p.shape[0] for p in spec.group.projections]
    q, k, v = (part.view(*shape, -1, spec.head_dim) for part in qkv.view(*shape, -1).split(widths, dim=-1))
    return q, k, v
