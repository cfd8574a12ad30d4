"""The FP8 product with an adapter's share, y = (s_a · a) (s_b · b)ᵀ + alpha · l rᵀ, in one kernel on Hopper GPUs.

A product of FP8 matrices takes half as long as one of bf16, reading and writing its result just as long, so a pass of
its own for the share costs a tenth to a fifth of the product. In a product of bf16 it is hidden beside the GPU's power
limit, and nothing was gained there.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from fastplug.ops import gluon
from fastplug.ops.gluon import ALIGNMENT, aligned, multiprocessors
from fastplug.ops.library import custom_op

LARGEST_RANK = 128
WAVES = 2  # tiles for each multiprocessor, below which cuBLAS cuts a product better
TILE = 128, 256  # rows and columns of the result that a program makes at once

broken: list[str] = []
"""Why the kernel is used no more, once a version of Triton could not compile it."""


def suits(a: torch.Tensor, b: torch.Tensor, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel computes such a product, and faster than PyTorch's and a pass over its result.

    Args:
        a: [M, K] e4m3.
        b: [N, K] e4m3.
        left: [M, R].
        right: [N, R]; its rows or its columns are contiguous.
        dtype: Of the result.
    """
    if broken or torch.compiler.is_compiling():  # which knows no addresses
        return False
    (M, K), N, R = a.shape, len(b), left.shape[1]
    processors = multiprocessors(a.device)
    if not processors or not M or not K or not 0 < R <= LARGEST_RANK:
        return False
    if WAVES * processors > -(-M // TILE[0]) * -(-N // TILE[1]) or N * dtype.itemsize % ALIGNMENT:
        return False
    if dtype not in (torch.bfloat16, torch.float16) or not left.dtype == right.dtype == dtype:
        return False
    return all(map(aligned, (a, b, left))) and (aligned(right) or aligned(right.t()))


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
    """Write y [M, N], contiguous, in tiles of 128 x 256. Asks that :func:`suits`, and that alpha is not 0.

    The sum of e4m3 products stays in the tensor cores' accumulator, which has fewer bits than fp32 ("fast
    accumulation", as in ``kernel.product``); the share is summed in fp32.
    """
    kernel: Any = importlib.import_module("fastplug.ops.fp8.hopper")  # Gluon takes its time to import
    kernel.launch(y, a, a_scale, b, b_scale, left, right, alpha, multiprocessors(a.device), TILE)


def attempt(*args: Any) -> bool:
    """:func:`fp8_product_add`, unless this version of Triton cannot compile it: then it is never tried again."""

    def call() -> bool:
        fp8_product_add(*args)
        return True

    return bool(gluon.attempt(broken, "adapters are added to FP8 products in passes of their own", call))


__all__ = ["attempt", "broken", "fp8_product_add", "suits"]
