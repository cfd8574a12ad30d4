"""fastplug for the Hugging Face Trainer and every trainer built on it (TRL): ``callbacks=[FastPlugCallback()]``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastplug_hf.callback import FastPlugCallback

__all__ = ["FastPlugCallback"]


def __getattr__(name: str) -> Any:
    if name != "FastPlugCallback":
        raise AttributeError(f"module 'fastplug_hf' has no attribute {name!r}")
    try:
        from fastplug_hf.callback import FastPlugCallback
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        from fastplug.errors import MissingExtra

        raise MissingExtra("transformers", "hf", "fastplug_hf.FastPlugCallback") from error
    return FastPlugCallback
