"""The backward of the adapted gated unit for Hopper GPUs, in Gluon; see ``tiles.py``.

The tiles of a column follow one another, so the gradients of A and B stay in registers until it ends. What its channels
add to a token's g B is written for each column.
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

from fastplug.ops.adapted_glu.sizes import TILE, Stretches, blocks_per_column
from fastplug.ops.adapted_glu.tiles import (
    WARPS,
    async_load,
    async_store,
    barrier,
    share,
    value_and_slope,
)
from fastplug.ops.ahead import launched
from fastplug.ops.descriptors import matrix
from fastplug.ops.launch import on_device


@gluon.jit
def _fetch_backward(
    j,
    tiles,
    start,
    token_blocks,
    tensors,
    thin,
    buffers,
    thin_buffers,
    ready,
    thin_ready,
    R: gl.constexpr,
    SUB: gl.constexpr,
    STAGES: gl.constexpr,
):
    d, gate, up = tensors
    xa_gate, xa_up, gb = thin
    d_buffer, gate_buffer, up_buffer = buffers
    inside = j < tiles
    unit = j // SUB
    sub = j % SUB
    row = (start + unit) % token_blocks * 64
    column = ((start + unit) // token_blocks * SUB + sub) * 64
    stage = j % STAGES
    mbarrier.expect(ready.index(stage), 3 * 64 * 64 * 2, pred=inside)
    async_load(d, [row, column], ready.index(stage), d_buffer.index(stage), pred=inside)
    async_load(gate, [row, column], ready.index(stage), gate_buffer.index(stage), pred=inside)
    async_load(up, [row, column], ready.index(stage), up_buffer.index(stage), pred=inside)
    xa_gate_buffer, xa_up_buffer, gb_buffer = thin_buffers
    first = inside & (sub == 0)
    slot = unit % 2
    mbarrier.expect(thin_ready.index(slot), 3 * 64 * R * 2, pred=first)
    async_load(xa_gate, [row, 0], thin_ready.index(slot), xa_gate_buffer.index(slot), pred=first)
    async_load(xa_up, [row, 0], thin_ready.index(slot), xa_up_buffer.index(slot), pred=first)
    async_load(gb, [row, 0], thin_ready.index(slot), gb_buffer.index(slot), pred=first)


@gluon.jit
def _backward_tile(
    row,
    column,
    stores,
    tile,
    thin,
    matrices,
    gb_gate,
    gb_up,
    db_gate,
    db_up,
    da,
    ready,
    phase,
    ACTIVATION: gl.constexpr,
    layout: gl.constexpr,
):
    """One tile: its gradients, and what it adds to the thin products."""
    d_gate, d_up = stores
    d_tile, gate_tile, up_tile = tile
    xa_gate, xa_up, gb = thin
    b_gate, b_up, a = matrices
    nothing = gl.zeros((64, 64), gl.float32, layout)
    d = share(gb, a, nothing)
    g = share(xa_gate, b_gate.permute((1, 0)), nothing)
    u = share(xa_up, b_up.permute((1, 0)), nothing)
    d, g, u = warpgroup_mma_wait(0, (d, g, u))
    mbarrier.wait(ready, phase)
    d = d + d_tile.load(layout).to(gl.float32)
    g = g + gate_tile.load(layout).to(gl.float32)
    u = u + up_tile.load(layout).to(gl.float32)
    act, slope = value_and_slope(g, ACTIVATION)
    gate_tile.store((d * u * slope).to(gate_tile.dtype))
    up_tile.store((d * act).to(up_tile.dtype))
    d_tile.store((act * u).to(d_tile.dtype))
    fence_async_shared()
    barrier()
    async_store(d_gate, [row, column], gate_tile)
    async_store(d_up, [row, column], up_tile)
    gb_gate = warpgroup_mma(gate_tile, b_gate, gb_gate, is_async=True)
    gb_up = warpgroup_mma(up_tile, b_up, gb_up, is_async=True)
    db_gate = warpgroup_mma(gate_tile.permute((1, 0)), xa_gate, db_gate, is_async=True)
    db_up = warpgroup_mma(up_tile.permute((1, 0)), xa_up, db_up, is_async=True)
    da = warpgroup_mma(d_tile.permute((1, 0)), gb, da, is_async=True)
    return warpgroup_mma_wait(0, (gb_gate, gb_up, db_gate, db_up, da))


@gluon.jit
def _write_column(parts, column, N, which: gl.constexpr, part, layout: gl.constexpr, R: gl.constexpr):
    channels = column + gl.arange(0, 64, gl.SliceLayout(1, layout))
    ranks = gl.arange(0, R, gl.SliceLayout(0, layout))
    offsets = gl.expand_dims(channels, 1) * R + gl.expand_dims(ranks, 0)
    gl.store(parts + which * (N * R) + offsets, part, mask=gl.expand_dims(channels < N, 1))


@gluon.jit(do_not_specialize=["T", "N", "token_blocks", "units", "programs"])
def _backward_kernel(
    d,  # descriptors: [T, N] in tiles; the gradient of the unit's result without the share of down's adapter
    gate,  # [T, N], without their adapters' share
    up,
    d_gate,  # [T, N]
    d_up,
    xa_gate,  # [T, R] in blocks of [64, R]
    xa_up,
    gb,  # of down
    b_gate,  # [N, R] in blocks of [64, R]
    b_up,
    a,  # of down, [R, N] in blocks of [R, 64]
    gb_parts,  # [columns, T, 2 R]: what the channels of each column add to the gradients of x Aᵀ of gate and up,
    # rounded to 16 bits: a column is one of many, so that their sum is off by what rounding it alone would make it
    ab_parts,  # [slots, 3, N, R] fp32: likewise of programs to the gradients of B of gate and up and of A of down
    T,
    N,
    token_blocks,
    units,
    programs,
    ACTIVATION: gl.constexpr,
    R: gl.constexpr,
    SUB: gl.constexpr,  # blocks of 64 channels that make a column: 1 or 2
    STAGES: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16])
    d_buffer = gl.allocate_shared_memory(d.dtype, [STAGES, 64, 64], d.layout)
    gate_buffer = gl.allocate_shared_memory(d.dtype, [STAGES, 64, 64], d.layout)
    up_buffer = gl.allocate_shared_memory(d.dtype, [STAGES, 64, 64], d.layout)
    xa_gate_buffer = gl.allocate_shared_memory(d.dtype, [2, 64, R], xa_gate.layout)
    xa_up_buffer = gl.allocate_shared_memory(d.dtype, [2, 64, R], xa_gate.layout)
    gb_buffer = gl.allocate_shared_memory(d.dtype, [2, 64, R], xa_gate.layout)
    b_gate_buffer = gl.allocate_shared_memory(d.dtype, [SUB, 64, R], b_gate.layout)
    b_up_buffer = gl.allocate_shared_memory(d.dtype, [SUB, 64, R], b_gate.layout)
    a_buffer = gl.allocate_shared_memory(d.dtype, [SUB, R, 64], a.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    thin_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    matrices_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for place in gl.static_range(STAGES):
        mbarrier.init(ready.index(place), count=1)
    mbarrier.init(thin_ready.index(0), count=1)
    mbarrier.init(thin_ready.index(1), count=1)
    mbarrier.init(matrices_ready, count=1)
    fence_async_shared()
    barrier()

    program = gl.program_id(0).to(gl.int64)
    start = (program * units // programs).to(gl.int32)
    end = ((program + 1) * units // programs).to(gl.int32)
    tiles = (end - start) * SUB
    tensors, thin = (d, gate, up), (xa_gate, xa_up, gb)
    buffers, thin_buffers = (d_buffer, gate_buffer, up_buffer), (xa_gate_buffer, xa_up_buffer, gb_buffer)
    for ahead in gl.static_range(STAGES - 1):
        _fetch_backward(
            ahead, tiles, start, token_blocks, tensors, thin, buffers, thin_buffers, ready, thin_ready, R, SUB, STAGES
        )
    unit = start
    loaded = 0
    while unit < end:
        block = unit // token_blocks
        stop = gl.minimum(end, (block + 1) * token_blocks)
        mbarrier.expect(matrices_ready, SUB * 3 * 64 * R * 2)
        for sub in gl.static_range(SUB):
            column = (block * SUB + sub) * 64
            async_load(b_gate, [column, 0], matrices_ready, b_gate_buffer.index(sub))
            async_load(b_up, [column, 0], matrices_ready, b_up_buffer.index(sub))
            async_load(a, [0, column], matrices_ready, a_buffer.index(sub))
        mbarrier.wait(matrices_ready, loaded & 1)
        loaded += 1
        db_gate0 = gl.zeros((64, R), gl.float32, narrow)
        db_up0 = gl.zeros((64, R), gl.float32, narrow)
        da0 = gl.zeros((64, R), gl.float32, narrow)
        db_gate1 = gl.zeros((64, R), gl.float32, narrow)
        db_up1 = gl.zeros((64, R), gl.float32, narrow)
        da1 = gl.zeros((64, R), gl.float32, narrow)
        for i in range(unit, stop):
            k = i - start
            row = i % token_blocks * 64
            slot = k % 2
            mbarrier.wait(thin_ready.index(slot), k // 2 & 1)
            thin_tile = (xa_gate_buffer.index(slot), xa_up_buffer.index(slot), gb_buffer.index(slot))
            gb_gate = gl.zeros((64, R), gl.float32, narrow)
            gb_up = gl.zeros((64, R), gl.float32, narrow)
            for sub in gl.static_range(SUB):
                j = k * SUB + sub
                stage = j % STAGES
                tile = (d_buffer.index(stage), gate_buffer.index(stage), up_buffer.index(stage))
                matrices = (b_gate_buffer.index(sub), b_up_buffer.index(sub), a_buffer.index(sub))
                column = (block * SUB + sub) * 64
                if sub == 0:
                    gb_gate, gb_up, db_gate0, db_up0, da0 = _backward_tile(
                        row, column, (d_gate, d_up), tile, thin_tile, matrices, gb_gate, gb_up, db_gate0, db_up0, da0,
                        ready.index(stage), j // STAGES & 1, ACTIVATION, layout,
                    )  # fmt: skip
                else:
                    gb_gate, gb_up, db_gate1, db_up1, da1 = _backward_tile(
                        row, column, (d_gate, d_up), tile, thin_tile, matrices, gb_gate, gb_up, db_gate1, db_up1, da1,
                        ready.index(stage), j // STAGES & 1, ACTIVATION, layout,
                    )  # fmt: skip
                tma.store_wait(2)  # the tile before this one has left the buffers that are filled next
                barrier()
                _fetch_backward(
                    j + STAGES - 1, tiles, start, token_blocks, tensors, thin, buffers, thin_buffers, ready,
                    thin_ready, R, SUB, STAGES,
                )  # fmt: skip
            tokens = row + gl.arange(0, 64, gl.SliceLayout(1, narrow))
            ranks = gl.arange(0, R, gl.SliceLayout(0, narrow))
            target = gb_parts + block.to(gl.int64) * T * (2 * R)
            target = target + gl.expand_dims(tokens, 1) * (2 * R) + gl.expand_dims(ranks, 0)
            mask = gl.expand_dims(tokens < T, 1)
            gl.store(target, gb_gate, mask=mask)
            gl.store(target + R, gb_up, mask=mask)
        first = (((block * token_blocks).to(gl.int64) + 1) * programs - 1) // units  # that works on this column
        parts = ab_parts + (program - first) * (3 * N * R)
        column = block * SUB * 64
        _write_column(parts, column, N, 0, db_gate0, narrow, R)
        _write_column(parts, column, N, 1, db_up0, narrow, R)
        _write_column(parts, column, N, 2, da0, narrow, R)
        if SUB == 2:
            _write_column(parts, column + 64, N, 0, db_gate1, narrow, R)
            _write_column(parts, column + 64, N, 1, db_up1, narrow, R)
            _write_column(parts, column + 64, N, 2, da1, narrow, R)
        barrier()  # everyone is done with the matrices
        unit = stop
    tma.store_wait(0)


def launch(
    d_out: torch.Tensor,
    gb: torch.Tensor,
    gate_up: torch.Tensor,
    d_gate_up: torch.Tensor,
    xa: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
    a: torch.Tensor,
    rank: int,
    processors: int,
    activation: str,
    sub: int | None = None,
    stages: int | None = None,
    residents: int = 2,
) -> tuple[torch.Tensor, torch.Tensor, Stretches, int]:
    """Write ``d_gate_up``; returns the parts of the thin products, see :func:`_backward_kernel`, which programs wrote
    them (those of a column in the first slots, nobody in the others), and how many tiles of channels a column has."""
    T, N = d_out.shape
    sub = blocks_per_column(rank) if sub is None else sub
    stages = (3 if rank < 64 else 2) if stages is None else stages  # in 113 KiB, so that two programs are resident
    columns, token_blocks = triton.cdiv(N, TILE * sub), triton.cdiv(T, TILE)
    units = columns * token_blocks
    programs = min(units, residents * processors)
    gb_parts = torch.empty(columns, T, 2 * rank, dtype=d_out.dtype, device=d_out.device)
    stretches = Stretches(token_blocks, units, programs)
    ab_parts = torch.empty(stretches.slots, 3, N, rank, dtype=torch.float32, device=d_out.device)
    tensors = (d_out, gate_up[:, :N], gate_up[:, N:], d_gate_up[:, :N], d_gate_up[:, N:])
    with on_device(gate_up):
        launched(_backward_kernel, (programs,))(
            *(matrix(t, TILE, TILE) for t in tensors), *(matrix(t, TILE, rank) for t in (*xa, gb, *b)),
            matrix(a, rank, TILE), gb_parts, ab_parts, T, N, token_blocks, units, programs, activation, rank, sub,
            stages, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return gb_parts, ab_parts, stretches, sub
