"""A gated MLP over a long sequence: a tile of rows after the other, so that gate and up never exist for all of them.

Every tile's base weights are read (and decoded) again, which takes as long as the product of a few hundred rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fastplug.ops.lora.adapted_unit import activated
from fastplug.ops.lora.gated_mlp_rows import backward, normalized
from fastplug.ops.lora.group import Grads, Kept
from fastplug.ops.recompute import tensors_left

if TYPE_CHECKING:
    from fastplug.ops.lora.gated_mlp import GatedMLP


def forward_in_tiles(
    ctx: Any, spec: GatedMLP, h: torch.Tensor, weight: torch.Tensor | None, tiles: list[slice], shape: torch.Size
) -> Any:
    """The node's forward for h = x + residual [tokens, hidden]: saves h, and the masks where adapters drop.

    Without dropout a recomputation has nothing to compute here.
    """
    dtype, alone = spec.gate_up.dtype, spec.norm is None
    ctx.count = ctx.per_tile = 0
    if not spec.drops:
        ctx.save_for_backward(h, None, weight, None)
        if (spec.joined or alone) and tensors_left() == 1 + (weight is not None):
            return torch.empty_like(h).view(shape)  # recomputed for what it saves: nobody reads the output
    joined = spec.joined and not alone
    out = h.clone() if joined else torch.empty(h.shape, dtype=dtype, device=h.device)
    saved: list[torch.Tensor | None] = []
    for rows in tiles:
        normed = normalized(spec, h[rows], weight)[0]
        gate_up, kept = spec.gate_up.forward(normed)
        del normed
        hidden = activated(spec, gate_up)
        del gate_up
        down_kept = spec.down.adapters(hidden)
        if joined and h.dtype == dtype:
            spec.down.products(hidden, down_kept, out=out[rows], factor=spec.factor)
        elif joined:
            out[rows] += spec.down.products(hidden, down_kept, factor=spec.factor)
        else:
            out[rows] = spec.down.products(hidden, down_kept, factor=spec.factor)
        if spec.drops:
            ctx.count = len(kept.tensors())
            ctx.per_tile = ctx.count + len(down_kept.tensors())
            saved += [*kept.tensors(), *down_kept.tensors()]
    if spec.drops:
        ctx.save_for_backward(h, None, weight, None, *saved)
    out = torch.ops.aten._unsafe_view(out, shape)
    return out if spec.joined or alone else (out, h.view(shape))


def backward_in_tiles(
    ctx: Any,
    spec: GatedMLP,
    g: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor | None,
    saved: list[torch.Tensor | None],
    stream: torch.Tensor | None,
    tiles: list[slice],
) -> tuple[torch.Tensor | None, torch.Tensor | None, Grads]:
    """See :func:`fastplug.ops.lora.gated_mlp_rows.backward`; parameter gradients are summed in fp32."""
    dx: torch.Tensor | None = None
    sums: Grads = []
    dtypes: list[torch.dtype | None] = []
    for i, rows in enumerate(tiles):
        kept = None
        if ctx.per_tile:
            mine = saved[i * ctx.per_tile : (i + 1) * ctx.per_tile]
            kept = Kept.of(mine[: ctx.count]), Kept.of(mine[ctx.count :])
        part = None if stream is None else stream[rows]
        needs = ctx.needs_input_grad
        d_rows, d_weight, grads = backward(spec, g[rows], h[rows], None, weight, None, kept, part, needs)
        if d_rows is not None:
            if dx is None:
                dx = torch.empty(h.shape, dtype=d_rows.dtype, device=h.device)
            dx[rows] = d_rows
        found = [d_weight, *grads]
        if not sums:
            dtypes = [None if grad is None else grad.dtype for grad in found]
            sums = [None if grad is None else grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in found]
        else:
            for total, grad in zip(sums, found):
                if total is not None and grad is not None:
                    total += grad
    d_weight, *grads = (None if total is None else total.to(dtype) for total, dtype in zip(sums, dtypes))
    return dx, d_weight, grads
