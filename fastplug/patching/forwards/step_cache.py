"""A key-value cache that keeps nothing, for the forward of a training step that has no mask.

Given neither a mask nor a cache, transformers looks for packed sequences in the positions, even in those it has just
counted up itself, and waits for the GPU to answer (from 5.0; before, it builds a mask that no flash kernel takes). It
does not look where there is a cache. A real one would copy and hold every k and v.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch


@functools.cache
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a compiler cannot trace how it is made
def _step_cache_class() -> type:
    base: type = sys.modules["transformers.cache_utils"].Cache

    class StepCache(base):  # type: ignore[misc, valid-type]
        layers: tuple[Any, ...] = ()
        is_compileable = False

        def __init__(self) -> None:  # the base's would make layers
            pass

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return key_states, value_states

        def get_seq_length(self, layer_idx: int | None = 0, *args: Any) -> int:
            return 0

        def get_max_cache_shape(self, *args: Any) -> None:
            return None

        def get_mask_sizes(self, length: Any, layer_idx: int, *args: Any) -> tuple[int, int]:
            """(keys, offset); ``length`` is the number of queries, or their positions up to transformers 5.2."""
            return (length.shape[0] if isinstance(length, torch.Tensor) else length), 0

    return StepCache


def step_cache() -> Any:
    """A new stand-in, of transformers' own ``Cache`` type."""
    return _step_cache_class()()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def unpadded(mask: Any) -> Any:
    """A mask [B, S] of a batch, or None in the place of one that masks nothing.

    transformers looks, too, and waits for the GPU to tell; but not while it is traced, and then no flash kernel runs.
    """
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and bool((mask == 1).all()):
        return None
    return mask
