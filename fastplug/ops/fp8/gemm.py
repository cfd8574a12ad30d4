"""The FP8 product and an adapter's share in one kernel, for Hopper GPUs: y = (s_a · a) (s_b · b)ᵀ + alpha · l rᵀ.

A product of FP8 matrices takes half as long as one of bf16, reading and writing its result just as long, so a pass of
its own for the share costs a tenth to a sixth of the product. Here the share is a few more steps of the tensor cores
on the tile that a program has in its registers when the scales have been applied: in bf16, summed in fp32.

Programs are persistent: one for each multiprocessor, tiles in an order in which the programs that run together share
rows of a and b in the L2 cache. The copy engine fetches the next tile's operands while a result is written.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from fastplug.ops.launch import on_device, power_of_2
from fastplug.ops.library import custom_op

try:
    from fastplug.ops.fp8 import specialized
except (ImportError, AttributeError):  # before Triton 3.6
    specialized = None  # type: ignore[assignment]
try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4
    TensorDescriptor = None

FUSED = False  # whether the share is added here, or by ``low_rank`` in a pass of its own
SPECIALIZED = True  # whether the kernel with divided warps runs on a GPU, where Triton has what it is written in
ARCHITECTURE = (9, 0)  # Ada has no copy engine, and the tiles are not those of Blackwell
LARGEST_RANK = 128
ALIGNMENT = 16  # bytes between rows, for the copy engine


@dataclass(frozen=True)
class Config:
    """How a product is cut up.

    Attributes:
        block_m, block_n, block_k: A tile of the result, and how much of the sum is in work at once.
        block_r: How many columns of the share's factors are read at once.
        stages: How many blocks of the sum are on their way or in work.
        warps: Of a program.
        group: Rows of tiles that are walked through together, column by column.
        halves: Whether a tile is written in two parts, with half the shared memory.
        flatten: Whether loops over tiles and over the sum become one, so that fetching does not stop between tiles.
        resident: Programs of a multiprocessor.
        exact: Whether the sum moves to fp32 registers after every block. Else it stays in the tensor cores'
            accumulator, which for FP8 has fewer bits than fp32.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 128
    stages: int = 3
    warps: int = 8
    block_r: int = 32
    group: int = 8
    halves: bool = True
    flatten: bool = True
    resident: int = 1
    exact: bool = False


CONFIG = Config(stages=4, flatten=False)


@triton.jit
def _corner(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile: column by column within groups of rows."""
    rows = tl.cdiv(M, BLOCK_M)
    in_group = GROUP * tl.cdiv(N, BLOCK_N)
    first = tile // in_group * GROUP
    height = tl.minimum(rows - first, GROUP)
    place = tile % in_group
    return (first + place % height) * BLOCK_M, place // height * BLOCK_N


@triton.jit(do_not_specialize=["M", "N", "K", "PROGRAMS"])
def _product_kernel(
    a,  # descriptors: [M, K] e4m3 in blocks of [BLOCK_M, BLOCK_K]
    b,  # [N, K] e4m3, [BLOCK_N, BLOCK_K]
    y,  # [M, N], [BLOCK_M, BLOCK_N] or half of its columns
    a_scale_ptr,  # [M] fp32
    b_scale_ptr,  # [N] fp32
    left_ptr,  # [M, R]
    right_ptr,  # [N, R]
    left_stride,  # between rows, and between columns
    left_rank_stride,
    right_stride,
    right_rank_stride,
    M,
    N,
    K,
    alpha,
    PROGRAMS,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    HALVES: tl.constexpr,
    FLATTEN: tl.constexpr,
    IMPRECISE: tl.constexpr,  # after how many products the sum moves to fp32, None for never
):
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    tl.assume(steps > 0)
    done = tl.program_id(0) - PROGRAMS  # the tile once more: what is written need not wait for what is fetched
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        row, column = _corner(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(steps):
            x = a.load([row, k * BLOCK_K])
            w = b.load([column, k * BLOCK_K])
            total = tl.dot(x, w.T, total, max_num_imprecise_acc=IMPRECISE)

        done += PROGRAMS
        row, column = _corner(done, M, N, BLOCK_M, BLOCK_N, GROUP)
        rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        a_scale = tl.load(a_scale_ptr + rows, mask=rows < M, other=0.0)
        b_scale = tl.load(b_scale_ptr + columns, mask=columns < N, other=0.0)
        if R > 0:  # the products of both kinds have one accumulator, so alpha comes last
            total = total * (a_scale / alpha)[:, None] * b_scale[None, :]
            left_row = left_ptr + rows.to(tl.int64)[:, None] * left_stride
            right_row = right_ptr + columns.to(tl.int64)[None, :] * right_stride
            for first in tl.static_range(0, R, BLOCK_R):
                rank = first + tl.arange(0, BLOCK_R)
                left_mask, right_mask = (rows < M)[:, None], (columns < N)[None, :]
                if R % BLOCK_R:
                    left_mask, right_mask = left_mask & (rank < R)[None, :], right_mask & (rank < R)[:, None]
                left = tl.load(left_row + rank[None, :] * left_rank_stride, mask=left_mask, other=0.0)
                right = tl.load(right_row + rank[:, None] * right_rank_stride, mask=right_mask, other=0.0)
                total = tl.dot(left, right, total)
            total = total * alpha
        else:
            total = total * a_scale[:, None] * b_scale[None, :]
        if HALVES:
            parts = tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            part, other = tl.split(parts)
            y.store([row, column], part.to(y.dtype))
            y.store([row, column + BLOCK_N // 2], other.to(y.dtype))
        else:
            y.store([row, column], total.to(y.dtype))


@functools.cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # in the interpreter: several, with several tiles each
    return torch.cuda.get_device_properties(device).multi_processor_count


def suits(a: torch.Tensor, b: torch.Tensor, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel can compute a product: the GPU, the rank, and rows that lie as the copy engine wants them."""
    device = a.device
    if TensorDescriptor is None or left.shape[1] > LARGEST_RANK or min(*a.shape, *right.shape) == 0:
        return False
    if device.type == "cuda" and (
        torch.version.hip is not None or torch.cuda.get_device_capability(device) != ARCHITECTURE
    ):
        return False
    rows = right if right.stride(1) == 1 else right.t()
    result = dtype.itemsize == 2 and len(b) * 2 % ALIGNMENT == 0  # whose rows are contiguous
    return result and left.dtype == right.dtype == dtype and all(map(_aligned, (a, b, left, rows)))


def _aligned(tensor: torch.Tensor) -> bool:
    row = tensor.stride(0) * tensor.itemsize
    return tensor.stride(1) == 1 and row % ALIGNMENT == 0 and tensor.data_ptr() % ALIGNMENT == 0


def product_add(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    dtype: torch.dtype,
    alpha: float = 1.0,
) -> torch.Tensor:
    """See :func:`fastplug.ops.fp8.reference.product_add`; asks that :func:`suits`, and that alpha is not 0."""
    y = torch.empty(len(a), len(b), dtype=dtype, device=a.device)
    fp8_product_add(y, a, a_scale, b, b_scale, left, right, alpha)
    return y


@custom_op("y")
def fp8_product_add(
    y: torch.Tensor,
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    alpha: float,
) -> None:
    """Write y [M, N], contiguous."""
    if SPECIALIZED and specialized is not None and a.is_cuda:
        specialized.launch(y, a, a_scale, b, b_scale, left, right, alpha, _programs(a.device))
    else:
        launch(y, a, a_scale, b, b_scale, left, right, alpha, CONFIG)


def launch(
    y: torch.Tensor,
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    alpha: float,
    config: Config,
) -> Any:
    """The launch with a configuration, also without a share (``left`` and ``right`` None)."""
    (M, K), N = a.shape, len(b)
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    rank = 0 if left is None else left.shape[1]
    block_r = min(config.block_r, max(16, power_of_2(rank)))
    strides = (0, 0, 0, 0) if left is None or right is None else (*left.stride(), *right.stride())
    tiles = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    programs = min(tiles, config.resident * _programs(a.device))
    with on_device(a):
        return _product_kernel[(programs,)](
            _rows(a, block_m, block_k), _rows(b, block_n, block_k),
            _rows(y, block_m, block_n // 2 if config.halves else block_n),
            a_scale, b_scale, left, right, *strides, M, N, K, alpha, programs, rank, block_m, block_n, block_k, block_r,
            config.group, config.halves, config.flatten, block_k if config.exact else None,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip


def _rows(tensor: torch.Tensor, rows: int, columns: int) -> Any:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])
