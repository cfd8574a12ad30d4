"""A product with an adapter's share, y = a bᵀ + alpha · l rᵀ, in one kernel where the GPU is one of Hopper's.

Else the share is a pass of its own that reads and writes y, which takes a tenth to a fifth of the product's time.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch
import triton

from fastplug.ops.library import custom_op

logger = logging.getLogger("fastplug")
ARCHITECTURE = (9, 0)  # Ada has no copy engine, and the tiles are not those of Blackwell
LARGEST_RANK = 128
ALIGNMENT = 16  # bytes between rows, for the copy engine
WAVES = 2  # tiles for each multiprocessor, below which cuBLAS cuts a product better
BLOCK_M, BLOCK_N = 128, 256  # a tile
FIRST = (3, 6)  # the Triton that has what the kernel is written in
FP8 = torch.float8_e4m3fn

broken: list[str] = []
"""Why the kernel is used no more, once a version of Triton could not compile it."""


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Of a GPU that the kernel is for, or 0."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if device.type != "cuda" or torch.version.hip is not None or version < FIRST:
        return 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count if (properties.major, properties.minor) == ARCHITECTURE else 0


def suits(
    a: torch.Tensor, b: torch.Tensor, left: torch.Tensor, right: torch.Tensor, y: torch.Tensor | torch.dtype
) -> bool:
    """Whether the kernel computes such a product, and faster than cuBLAS and a pass over its result.

    Args:
        a: [M, K], e4m3 or in 16 bits.
        b: [N, K] in a's dtype; in 16 bits its rows or its columns may be contiguous.
        left: [M, R].
        right: [N, R].
        y: The result [M, N], rows may be strided, or the dtype of one that is yet to be made.
    """
    (M, K), N, R = a.shape, len(b), left.shape[1]
    if broken or torch.compiler.is_compiling():  # which knows no addresses
        return False
    processors = _multiprocessors(a.device)
    if not processors or not K or not 0 < R <= LARGEST_RANK:
        return False
    if WAVES * processors > -(-M // BLOCK_M) * -(-N // BLOCK_N):
        return False
    dtype = y.dtype if isinstance(y, torch.Tensor) else y
    if dtype not in (torch.bfloat16, torch.float16) or not left.dtype == right.dtype == dtype:
        return False
    if a.dtype != b.dtype or a.dtype not in (dtype, FP8):
        return False
    rows = y if isinstance(y, torch.Tensor) else None
    aligned = N * 2 % ALIGNMENT == 0 if rows is None else _aligned(rows)
    return aligned and _aligned(a) and _aligned(left) and all(_aligned(m) or _turns(m, a.dtype) for m in (b, right))


def _aligned(matrix: torch.Tensor) -> bool:
    row = matrix.stride(0) * matrix.itemsize
    return matrix.stride(1) == 1 and row % ALIGNMENT == 0 and matrix.data_ptr() % ALIGNMENT == 0


def _turns(matrix: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a matrix may be read by columns: those of 8 bits may not."""
    return matrix.dtype != FP8 and _aligned(matrix.t())


@custom_op("y")
def product_with_share(
    y: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    alpha: float,
    a_scale: torch.Tensor | None,
    b_scale: torch.Tensor | None,
) -> None:
    """Write y [M, N] = (a_scale · a) (b_scale · b)ᵀ + alpha · left rightᵀ, in tiles of 128 x 256, summed in fp32.

    Asks that :func:`suits`, and that alpha is not 0. A sum of e4m3 products stays in the tensor cores' accumulator,
    which has fewer bits than fp32 ("fast accumulation").
    """
    kernel: Any = importlib.import_module("fastplug.ops.low_rank.hopper")  # Gluon takes its time to import
    kernel.launch(y, a, a_scale, b, b_scale, left, right, alpha, _multiprocessors(a.device))


def attempt(*args: Any) -> bool:
    """:func:`product_with_share`, unless this version of Triton cannot compile it: then it is never tried again."""
    try:
        product_with_share(*args)
    except (RuntimeError, AttributeError, TypeError, ImportError, triton.CompilationError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error):
            raise
        broken.append(f"{type(error).__name__}: {error}")
        logger.warning(
            "fastplug: adapters are added in passes of their own, since Triton %s does not compile the kernel that "
            "adds them inside of products (%s)",
            triton.__version__,
            type(error).__name__,
        )
        return False
    return True


__all__ = ["attempt", "broken", "product_with_share", "suits"]
