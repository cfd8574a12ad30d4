"""Patch tables: one row of data per model family."""

from __future__ import annotations

from fastplug.families.row import Family, NormRow
from fastplug.manager import hookimpl


@hookimpl
def fastplug_families() -> list[Family]:
    from fastplug.families.llama import LLAMA
    from fastplug.families.mistral import MISTRAL
    from fastplug.families.qwen2 import QWEN2, QWEN3

    return [LLAMA, MISTRAL, QWEN2, QWEN3]


__all__ = ["Family", "NormRow"]
