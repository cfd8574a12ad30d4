"""What a cache of keys and values is called: that depends on transformers' version, and in older ones on the family."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

NEW = "cache"  # since transformers 5.24
NAMES = (NEW, "past_key_values", "past_key_value", "layer_past")  # the third up to 4.55; the last is GPT-NeoX's


def given(kwargs: dict[str, Any]) -> Any:
    """The cache among a forward's arguments, or None."""
    return next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)


def take(kwargs: dict[str, Any]) -> Any:
    """Likewise, and remove it from them under all its names."""
    cache = given(kwargs)
    for name in NAMES:
        kwargs.pop(name, None)
    return cache


def unknown(kwargs: dict[str, Any]) -> str | None:
    """The name of an argument that is a cache but none of :data:`NAMES`: a later version's, which must not be lost."""
    return next(
        (name for name, value in kwargs.items() if name not in NAMES and hasattr(value, "get_seq_length")), None
    )


def stands_in(cache: Any) -> bool:
    """Whether this is fastplug's stand-in, which keeps nothing: ``forwards/step_cache.py``."""
    return type(cache).__name__ == "StepCache"


@functools.cache
def name_in(forward: Callable[..., Any]) -> str:
    """What this forward of a model or backbone calls it."""
    return NEW if NEW in inspect.signature(forward).parameters else "past_key_values"


__all__ = ["NAMES", "NEW", "given", "name_in", "stands_in", "take", "unknown"]
