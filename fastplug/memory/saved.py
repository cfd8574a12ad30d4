"""Which tensors each node of a decoder layer saves under each policy, with their shapes.

Letters: T tokens of the step (batch x length, padding included), H hidden size, I width of gate (and of up), Q and K
channels of the queries and of the keys (K of the values too), N query heads, ``e`` bytes of an element of the residual
stream, ``c`` bytes of one in the compute dtype. ``A`` is the sum of the ranks of a group's adapters: ``qkv``, ``out``,
``gate_up``, ``down``.

=====================  ==================  =======================================================================
node                   tensors             bytes
=====================  ==================  =======================================================================
attention input        x                   T·H·e, the layer's input (its producer does not keep it)
                       1/rms               4·T
                       q, k, v             T·(Q + 2K)·c, one buffer
                       q, k before norm    T·(Q + K)·c more, of families with a norm over the heads: q and k are
                                           turned into tensors of their own, the raw ones stay with v
                       adapters            A·(T + H + Q + 2K)·c: x Aᵀ, the stacked A, the block-diagonal B
                       dropout masks       T·H for each adapter that drops
attention (sdpa)       q, k, v             the same memory as above
                       out                 T·Q·c
                       logsumexp           4·T·N (the CPU keeps it in fp32 as well)
                       repeated k, v       2·T·Q·c more where transformers repeats the heads itself: with a mask
output projection      its input           the same memory as attention's out
                       adapters            A·(T + Q + H)·c, masks T·Q
gated MLP              h                   T·H·e, the residual stream between attention and MLP
                       1/rms               4·T
                       gate and up         T·2I·c, one buffer
                       adapters            gate_up: A·(T + H + 2I)·c, masks T·H each; down: A·(T + I + H)·c, masks T·I
=====================  ==================  =======================================================================

What a policy keeps of it from the layer's forward to its backward:

- ``KEEP``: all of it.
- ``DROP_GATE_UP``: all but gate and up. In tiles (``tile_rows``) the MLP keeps h only, but with dropout also what the
  adapters keep, A and B of each tile.
- ``KEEP_ATTENTION``: x, attention's out and logsumexp, and x Aᵀ of down, so that its input need not be made again.
- ``RESIDUAL``: x, and x Aᵀ of down.
- ``OFFLOAD_...``: x Aᵀ of down where that stays; the rest in the host's memory. The device holds what two such layers
  keep at a time, for the copies (:data:`STAGED`).

What is computed again in the backward, in GEMMs of the layer: nothing; gate and up; q, k, v, out, gate and up;
the same and attention. The last projection, down, never is. Decoding a quantized weight comes with each of these
products once more.

Adapters' A and B that need no stacking and no cast (a group of one, in the compute dtype) are the parameters themselves
and take no memory. cos, sin and masks of attention belong to the step, not to a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastplug.memory.policy import Policy

BESIDE = "adapter's part of down"  # what the nodes of a layer that is computed again hold on the device
PIECE = 16 * 2**20  # bytes of a piece of host memory: offloaded tensors fill whole ones
STAGED = 2  # layers whose offloaded tensors are on the device at a time: the one that runs and the one being copied


@dataclass(frozen=True)
class Rank:
    """A group's adapters: the sum of their ranks, how many drop their input, and whether A and B are copied."""

    total: int = 0
    dropping: int = 0
    copied: bool = True


@dataclass(frozen=True)
class Widths:
    """The letters of this module for one layer; ``intermediate`` is 0 where its MLP is none of the fused ones."""

    hidden: int
    intermediate: int
    queries: int
    keys: int
    heads: int
    residual_bytes: int = 2
    compute_bytes: int = 2
    qkv: Rank = Rank()
    out: Rank = Rank()
    gate_up: Rank = Rank()
    down: Rank = Rank()
    head_norm: bool = False
    repeats: bool = False


def tensors(policy: Policy, w: Widths, tokens: int, tile_rows: int | None = None) -> dict[str, int]:
    """Bytes by tensor that one layer holds from its forward to its backward; under an offloading policy, on the host.

    Args:
        policy: What the layer keeps.
        w: The layer's widths.
        tokens: Batch times length, padding included.
        tile_rows: The MLP's tiles where gate and up are not kept.
    """
    T, c = tokens, w.compute_bytes
    x = {"residual stream": T * w.hidden * w.residual_bytes}
    attention = {"attention output": T * w.queries * c, "logsumexp": 4 * T * w.heads}
    whole = tile_rows is None or tile_rows >= T
    beside = {BESIDE: w.down.total * T * c} if whole and w.intermediate and not w.down.dropping else {}
    if policy.level is Policy.RESIDUAL:
        return {**x, **beside}
    if policy.level is Policy.KEEP_ATTENTION:
        return {**x, **attention, **beside}
    found = {
        **x,
        "1/rms": 4 * T,
        "q, k, v": T * (w.queries + 2 * w.keys) * c,
        **attention,
        "middle of the residual stream": T * w.hidden * w.residual_bytes,
        "adapters of q, k, v": _adapters(w.qkv, T, w.hidden, w.queries + 2 * w.keys, c),
        "adapter of the output": _adapters(w.out, T, w.queries, w.hidden, c),
    }
    if w.head_norm:
        found["q, k before their norm"] = T * (w.queries + w.keys) * c
    if w.repeats:
        found["repeated k, v"] = 2 * T * w.queries * c
    if policy.keeps_gate_up:
        found["gate, up"] = 2 * T * w.intermediate * c
    tiles = 1 if policy.keeps_gate_up or tile_rows is None else max(1, -(-T // tile_rows))
    if tiles == 1:
        found["1/rms of the MLP"] = 4 * T
    if tiles == 1 or w.gate_up.dropping or w.down.dropping:
        found["adapters of gate, up"] = _adapters(w.gate_up, T, w.hidden, 2 * w.intermediate, c, tiles)
        found["adapter of down"] = _adapters(w.down, T, w.intermediate, w.hidden, c, tiles)
    return {name: size for name, size in found.items() if size}


def saved(policy: Policy, w: Widths, tokens: int, tile_rows: int | None = None) -> int:
    """The sum of :func:`tensors`."""
    return sum(tensors(policy, w, tokens, tile_rows).values())


def host(policy: Policy, w: Widths, tokens: int) -> int:
    """Bytes of pinned host memory for one layer, in whole pieces; 0 where nothing is offloaded."""
    offloaded = [size for name, size in tensors(policy, w, tokens).items() if name != BESIDE]
    return sum(-(-size // PIECE) * PIECE for size in offloaded) if policy.offloads else 0


def _adapters(rank: Rank, T: int, inputs: int, outputs: int, c: int, tiles: int = 1) -> int:
    matrices = tiles * (inputs + outputs) if rank.copied else 0
    return rank.total * (T + matrices) * c + rank.dropping * T * inputs


__all__ = ["PIECE", "STAGED", "Rank", "Widths", "host", "saved", "tensors"]
