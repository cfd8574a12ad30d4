"""Kernels in Gluon, Triton's lower level: which GPU they are for, and what happens where one does not compile."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TypeVar

import torch
import triton

logger = logging.getLogger("fastplug")
ARCHITECTURE = (9, 0)  # Ada has no copy engine, and the tiles are not those of Blackwell
FIRST = (3, 6)  # the Triton that has what the kernels are written in
ALIGNMENT = 16  # bytes between rows, for the copy engine
T = TypeVar("T")


def recent() -> bool:
    """Whether this Triton has what the kernels are written in."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= FIRST


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU that the kernels are for, or 0."""
    if device.type != "cuda" or torch.version.hip is not None or not recent():
        return 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count if (properties.major, properties.minor) == ARCHITECTURE else 0


def aligned(matrix: torch.Tensor) -> bool:
    """Whether the copy engine can address it: contiguous rows that begin at multiples of 16 bytes."""
    row = matrix.stride(0) * matrix.itemsize
    return matrix.stride(1) == 1 and row % ALIGNMENT == 0 and matrix.data_ptr() % ALIGNMENT == 0


def attempt(broken: list[str], instead: str, call: Callable[[], T]) -> T | None:
    """``call()``, or None once this version of Triton could not compile it.

    Args:
        broken: Where the error is kept; the caller does not try again while there is one.
        instead: What happens now, for the log.
        call: Launches the kernel. Nothing has been written when it does not compile.
    """
    try:
        return call()
    except (RuntimeError, AttributeError, TypeError, ImportError, triton.CompilationError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error):
            raise
        broken.append(f"{type(error).__name__}: {error}")
        logger.warning(
            "fastplug: %s, since Triton %s does not compile the kernel for it (%s)",
            instead,
            triton.__version__,
            type(error).__name__,
        )
        return None
