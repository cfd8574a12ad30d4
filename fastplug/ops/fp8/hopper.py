"""The FP8 product with an adapter's share for Hopper GPUs, in Gluon, Triton's lower level: see ``share.py``.

Programs are persistent: one for each multiprocessor, tiles in an order in which the programs that run together share
rows of a and b in the L2 cache. Of a program's warps one fetches, eight multiply and write. The fetching warp runs
ahead over the end of a tile, so the tensor cores wait for nothing when the next one begins, and the share is one more
block of the sum in the same ring of buffers: a block of 128 e4m3 numbers takes the bytes of 64 bf16 ones.
"""

from __future__ import annotations

from typing import Any

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

from fastplug.ops.ahead import launched
from fastplug.ops.descriptors import matrix
from fastplug.ops.launch import on_device

BLOCK_K = 128
PARTS = 4  # in which a tile is written
WARPS, FETCH_REGISTERS, REGISTERS = 8, 24, 168  # (8 + 4) warps x 32 threads x 168 registers are all there are


# Named otherwise up to Triton 3.8, of which the last wants a buffer's other view to be as large.
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
WHOLE = triton.__version__.startswith("3.8.")
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _as(buffer, like, shape: gl.constexpr):
    """The buffer's bytes as a block of another descriptor."""
    if RENAMED:
        return buffer.reinterpret(like.dtype, shape, like.layout)
    else:
        return buffer._reinterpret(like.dtype, shape, like.layout)


@gluon.jit
def _corner(tile, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr):
    rows = gl.cdiv(M, BLOCK_M)
    in_group = GROUP * gl.cdiv(N, BLOCK_N)
    first = tile // in_group * GROUP
    height = gl.minimum(rows - first, GROUP)
    place = tile % in_group
    return (first + place % height) * BLOCK_M, place // height * BLOCK_N


@gluon.jit
def _fetch(
    descriptors,
    buffers,
    barriers,
    sizes,
    R: gl.constexpr,
    RIGHT_TRANSPOSED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    a, b, left, right = descriptors
    a_buffers, b_buffers = buffers
    ready, empty = barriers
    M, N, K, tiles, programs = sizes
    step = 0
    for tile in range(gl.program_id(0), tiles, programs):
        row, column = _corner(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        for k in range(0, K, BLOCK_K):
            index = step % STAGES
            mbarrier.wait(empty.index(index), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(index), (BLOCK_M + BLOCK_N) * BLOCK_K)
            async_load(a, [row, k], ready.index(index), a_buffers.index(index))
            async_load(b, [column, k], ready.index(index), b_buffers.index(index))
            step += 1
        for r in gl.static_range(0, R, BLOCK_R):
            index = step % STAGES
            mbarrier.wait(empty.index(index), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(index), (BLOCK_M + BLOCK_N) * BLOCK_R * 2)
            left_buffer = _as(a_buffers.index(index), left, [BLOCK_M, BLOCK_R])
            async_load(left, [row, r], ready.index(index), left_buffer)
            if RIGHT_TRANSPOSED:
                right_buffer = _as(b_buffers.index(index), right, [BLOCK_R, BLOCK_N])
                async_load(right, [r, column], ready.index(index), right_buffer)
            else:
                right_buffer = _as(b_buffers.index(index), right, [BLOCK_N, BLOCK_R])
                async_load(right, [column, r], ready.index(index), right_buffer)
            step += 1


@gluon.jit
def _write(y, staging, part, row, column, place: gl.constexpr):
    tma.store_wait(1)  # the part before the last one, which lay in this buffer
    staging.index(place % 2).store(part.to(y.dtype))
    fence_async_shared()
    async_store(y, [row, column], staging.index(place % 2))


@gluon.jit
def _halves(x):
    return x.reshape((x.shape[0], 2, x.shape[1] // 2)).permute((0, 2, 1)).split()


@gluon.jit
def _multiply(
    descriptors,
    buffers,
    barriers,
    staging,
    y,
    scales,
    alpha,
    sizes,
    R: gl.constexpr,
    RIGHT_TRANSPOSED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    left, right = descriptors[2], descriptors[3]
    a_buffers, b_buffers = buffers
    ready, empty = barriers
    a_scale_ptr, b_scale_ptr = scales
    M, N, K, tiles, programs = sizes
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 32])
    share_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    step = 0
    for tile in range(gl.program_id(0), tiles, programs):
        row, column = _corner(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        rows, columns = row + gl.arange(0, BLOCK_M, flat), column + gl.arange(0, BLOCK_N, flat)
        a_scale = gl.load(a_scale_ptr + rows, mask=rows < M, other=0.0)
        b_scale = gl.load(b_scale_ptr + columns, mask=columns < N, other=0.0)
        total = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout)
        for k in range(0, K, BLOCK_K):
            index = step % STAGES
            mbarrier.wait(ready.index(index), step // STAGES & 1)
            x, w = a_buffers.index(index), b_buffers.index(index).permute((1, 0))
            total = warpgroup_mma(x, w, total, is_async=True)
            total = warpgroup_mma_wait(1, (total,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        total = warpgroup_mma_wait(0, (total,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        a_scale = a_scale / alpha  # the products of both kinds have one accumulator, so alpha comes last
        a_scale = gl.convert_layout(a_scale, gl.SliceLayout(1, layout))
        b_scale = gl.convert_layout(b_scale, gl.SliceLayout(0, layout))
        total = total * gl.expand_dims(a_scale, 1) * gl.expand_dims(b_scale, 0)
        total = gl.convert_layout(total, share_layout)
        for _block in gl.static_range(0, R, BLOCK_R):
            index = step % STAGES
            mbarrier.wait(ready.index(index), step // STAGES & 1)
            x = _as(a_buffers.index(index), left, [BLOCK_M, BLOCK_R])
            if RIGHT_TRANSPOSED:
                w = _as(b_buffers.index(index), right, [BLOCK_R, BLOCK_N])
            else:
                w = _as(b_buffers.index(index), right, [BLOCK_N, BLOCK_R])
                w = w.permute((1, 0))
            total = warpgroup_mma(x, w, total, is_async=True)
            total = warpgroup_mma_wait(0, (total,))
            mbarrier.arrive(empty.index(index))
            step += 1
        total = total * alpha
        first, second = _halves(total)
        part0, part1 = _halves(first)
        part2, part3 = _halves(second)
        _write(y, staging, part0, row, column, 0)
        _write(y, staging, part1, row, column + BLOCK_N // 4, 1)
        _write(y, staging, part2, row, column + BLOCK_N // 2, 2)
        _write(y, staging, part3, row, column + BLOCK_N // 4 * 3, 3)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "K", "tiles", "programs"])
def _product_kernel(
    a,  # descriptors: [M, K] e4m3 in blocks of [BLOCK_M, BLOCK_K]
    b,  # [N, K] e4m3, [BLOCK_N, BLOCK_K]
    y,  # [M, N], [BLOCK_M, BLOCK_N / 4]
    left,  # [M, R], [BLOCK_M, BLOCK_R]
    right,  # [N, R], [BLOCK_N, BLOCK_R], or [R, N], [BLOCK_R, BLOCK_N]
    a_scale_ptr,  # [M] fp32
    b_scale_ptr,  # [N] fp32
    M,
    N,
    K,
    alpha,
    tiles,
    programs,
    R: gl.constexpr,
    RIGHT_TRANSPOSED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    FETCH_REGISTERS: gl.constexpr,
):
    a_buffers = gl.allocate_shared_memory(a.dtype, [STAGES, BLOCK_M, BLOCK_K], a.layout)
    b_buffers = gl.allocate_shared_memory(b.dtype, [STAGES, BLOCK_N, BLOCK_K], b.layout)
    staging = gl.allocate_shared_memory(y.dtype, [2, BLOCK_M, BLOCK_N // 4], y.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    descriptors, buffers, barriers = (a, b, left, right), (a_buffers, b_buffers), (ready, empty)
    sizes = (M, N, K, tiles, programs)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    descriptors, buffers, barriers, staging, y, (a_scale_ptr, b_scale_ptr), alpha, sizes, R,
                    RIGHT_TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, STAGES, GROUP,
                ),
            ),
            (
                _fetch,
                (
                    descriptors, buffers, barriers, sizes, R, RIGHT_TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
                    STAGES, GROUP,
                ),
            ),
        ],
        [1],
        [FETCH_REGISTERS],
    )  # fmt: skip


def launch(
    y: torch.Tensor,
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    alpha: float,
    programs: int,
    tile: tuple[int, int],
    stages: int = 4,
    group: int = 8,
) -> Any:
    """Write y [M, N] in tiles of ``tile``; see :func:`fastplug.ops.fp8.share.fp8_product_add`."""
    block_m, block_n = tile
    (M, K), N, rank, transposed = a.shape, len(b), left.shape[1], right.stride(1) != 1
    block_r = 64 if WHOLE or rank > 32 else 32 if rank > 16 else 16
    right_rows = matrix(right.t(), block_r, block_n) if transposed else matrix(right, block_n, block_r)
    tiles = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    programs = min(tiles, programs)
    with on_device(a):
        return launched(_product_kernel, (programs,))(
            matrix(a, block_m, BLOCK_K), matrix(b, block_n, BLOCK_K), matrix(y, block_m, block_n // PARTS),
            matrix(left, block_m, block_r), right_rows, a_scale, b_scale, M, N, K, alpha, tiles, programs, rank,
            transposed, block_m, block_n, BLOCK_K, block_r, stages, group, FETCH_REGISTERS, num_warps=WARPS,
            maxnreg=REGISTERS, enable_fp_fusion=True,
        )  # fmt: skip
