"""Packing documents into rows of one length, and batches without padding. Attention stays within documents."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastplug.data.collator import PaddingFreeCollator
    from fastplug.data.packing import pack

_HOME = {"PaddingFreeCollator": "fastplug.data.collator", "pack": "fastplug.data.packing"}

__all__ = ["PaddingFreeCollator", "pack"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastplug.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
