"""The forward of the adapted gated unit for Hopper GPUs, in Gluon; see ``tiles.py``.

The tiles of a row follow one another, so x Aᵀ of the projection that follows stays in registers until it ends.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastplug.ops.adapted_glu.sizes import TILE, Stretches
from fastplug.ops.adapted_glu.tiles import WARPS, async_load, async_store, barrier, share, value
from fastplug.ops.ahead import launched
from fastplug.ops.descriptors import matrix
from fastplug.ops.launch import on_device


@gluon.jit
def _fetch_forward(j, tiles, start, blocks, tensors, buffers, ready, R: gl.constexpr, STAGES: gl.constexpr):
    gate, up, b_gate, b_up, a = tensors
    gate_buffer, up_buffer, b_gate_buffer, b_up_buffer, a_buffer = buffers
    inside = j < tiles
    row = (start + j) // blocks * 64
    column = (start + j) % blocks * 64
    stage = j % STAGES
    mbarrier.expect(ready.index(stage), (2 * 64 + 3 * R) * 64 * 2, pred=inside)
    async_load(b_gate, [column, 0], ready.index(stage), b_gate_buffer.index(stage), pred=inside)
    async_load(b_up, [column, 0], ready.index(stage), b_up_buffer.index(stage), pred=inside)
    async_load(a, [0, column], ready.index(stage), a_buffer.index(stage), pred=inside)
    async_load(gate, [row, column], ready.index(stage), gate_buffer.index(stage), pred=inside)
    async_load(up, [row, column], ready.index(stage), up_buffer.index(stage), pred=inside)


@gluon.jit(do_not_specialize=["T", "blocks", "tiles_all", "programs"])
def _forward_kernel(
    gate,  # descriptors: [T, N] in tiles, without their adapters' share
    up,
    out,  # [T, N]
    xa_gate,  # [T, R] in blocks of [64, R]
    xa_up,
    b_gate,  # [N, R] in blocks of [64, R]
    b_up,
    a,  # of down, [R, N] in blocks of [R, 64]
    xa_parts,  # [slots, T, R] fp32: what programs add to out Aᵀ
    T,
    blocks,
    tiles_all,
    programs,
    ACTIVATION: gl.constexpr,
    R: gl.constexpr,
    STAGES: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16])
    gate_buffer = gl.allocate_shared_memory(out.dtype, [STAGES, 64, 64], out.layout)
    up_buffer = gl.allocate_shared_memory(out.dtype, [STAGES, 64, 64], out.layout)
    b_gate_buffer = gl.allocate_shared_memory(out.dtype, [STAGES, 64, R], b_gate.layout)
    b_up_buffer = gl.allocate_shared_memory(out.dtype, [STAGES, 64, R], b_gate.layout)
    a_buffer = gl.allocate_shared_memory(out.dtype, [STAGES, R, 64], a.layout)
    xa_gate_buffer = gl.allocate_shared_memory(out.dtype, [64, R], xa_gate.layout)
    xa_up_buffer = gl.allocate_shared_memory(out.dtype, [64, R], xa_gate.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    thin_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for place in gl.static_range(STAGES):
        mbarrier.init(ready.index(place), count=1)
    mbarrier.init(thin_ready, count=1)
    fence_async_shared()
    barrier()

    program = gl.program_id(0).to(gl.int64)
    start = (program * tiles_all // programs).to(gl.int32)
    end = ((program + 1) * tiles_all // programs).to(gl.int32)
    tensors = (gate, up, b_gate, b_up, a)
    buffers = (gate_buffer, up_buffer, b_gate_buffer, b_up_buffer, a_buffer)
    for ahead in gl.static_range(STAGES - 1):
        _fetch_forward(ahead, end - start, start, blocks, tensors, buffers, ready, R, STAGES)
    nothing = gl.zeros((64, 64), gl.float32, layout)
    unit = start
    loaded = 0
    while unit < end:
        row = unit // blocks * 64
        stop = gl.minimum(end, (unit // blocks + 1) * blocks)
        mbarrier.expect(thin_ready, 2 * 64 * R * 2)
        async_load(xa_gate, [row, 0], thin_ready, xa_gate_buffer)
        async_load(xa_up, [row, 0], thin_ready, xa_up_buffer)
        mbarrier.wait(thin_ready, loaded & 1)
        loaded += 1
        xa = gl.zeros((64, R), gl.float32, narrow)
        for i in range(unit, stop):
            j = i - start
            stage = j % STAGES
            mbarrier.wait(ready.index(stage), j // STAGES & 1)
            gate_tile = gate_buffer.index(stage)
            g = share(xa_gate_buffer, b_gate_buffer.index(stage).permute((1, 0)), nothing)
            u = share(xa_up_buffer, b_up_buffer.index(stage).permute((1, 0)), nothing)
            g, u = warpgroup_mma_wait(0, (g, u))
            g = g + gate_tile.load(layout).to(gl.float32)
            u = u + up_buffer.index(stage).load(layout).to(gl.float32)
            gate_tile.store((value(g, ACTIVATION) * u).to(out.dtype))
            fence_async_shared()
            barrier()
            async_store(out, [row, i % blocks * 64], gate_tile)
            xa = warpgroup_mma(gate_tile, a_buffer.index(stage).permute((1, 0)), xa, is_async=True)
            xa = warpgroup_mma_wait(0, (xa,))
            tma.store_wait(1)  # the tile before this one has left the buffer that is filled next
            barrier()
            _fetch_forward(j + STAGES - 1, end - start, start, blocks, tensors, buffers, ready, R, STAGES)
        tokens = row + gl.arange(0, 64, gl.SliceLayout(1, narrow))
        ranks = gl.arange(0, R, gl.SliceLayout(0, narrow))
        first = ((unit // blocks * blocks).to(gl.int64) + 1) * programs - 1
        parts = xa_parts + (program - first // tiles_all) * T * R
        offsets = gl.expand_dims(tokens, 1) * R + gl.expand_dims(ranks, 0)
        gl.store(parts + offsets, xa, mask=gl.expand_dims(tokens < T, 1))
        unit = stop
    tma.store_wait(0)


def launch(
    gate_up: torch.Tensor,
    out: torch.Tensor,
    xa: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
    a: torch.Tensor,
    rank: int,
    processors: int,
    activation: str,
    stages: int | None = None,
    residents: int | None = None,
) -> tuple[torch.Tensor, Stretches]:
    """Write ``out``; returns the parts of out Aᵀ, see :func:`_forward_kernel`, and which programs wrote them: those of
    a row of tiles in the first slots, nobody in the others."""
    T, N = out.shape
    stages = (3 if rank < 64 else 2) if stages is None else stages
    residents = (3 if rank == 16 else 2) if residents is None else residents
    blocks = triton.cdiv(N, TILE)
    tiles = blocks * triton.cdiv(T, TILE)
    programs = min(tiles, residents * processors)
    stretches = Stretches(blocks, tiles, programs)
    xa_parts = torch.empty(stretches.slots, T, rank, dtype=torch.float32, device=out.device)
    with on_device(gate_up):
        launched(_forward_kernel, (programs,))(
            *(matrix(t, TILE, TILE) for t in (gate_up[:, :N], gate_up[:, N:], out)),
            *(matrix(t, TILE, rank) for t in (*xa, *b)), matrix(a, rank, TILE), xa_parts, T, blocks, tiles, programs,
            activation, rank, stages, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return xa_parts, stretches
