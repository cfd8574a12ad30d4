"""Patch tables: one row of data per model family."""

from __future__ import annotations

import importlib

from fastplug.families.row import Family, NormRow, QKNormRow, RopeRow
from fastplug.manager import hookimpl

MODULES = (
    "llama", "mistral", "qwen2", "gemma", "phi", "granite", "smollm", "olmo", "glm", "ernie", "exaone", "helium",
    "apertus", "seed_oss", "cohere", "layer_norm_models", "mixtures", "parts", "vision",
)  # fmt: skip


@hookimpl
def fastplug_families() -> list[Family]:
    rows: list[Family] = []
    for name in MODULES:
        rows.extend(importlib.import_module(f"fastplug.families.{name}").FAMILIES)
    return rows


__all__ = ["Family", "NormRow", "QKNormRow", "RopeRow"]
