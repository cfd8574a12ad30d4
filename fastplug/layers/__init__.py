"""Quantized linear layers one can use alone, and what turns models into them.

``quantize_`` and ``load`` make models of ``QuantLinear``, with or without bitsandbytes; ``save`` writes them as
transformers reads them. ``LoRALinear`` is one with an adapter, for models that do not use PEFT. ``expand_blocks`` adds
blocks to a model (LLaMA-Pro), ``loraplus_groups`` gives an optimizer LoRA+'s learning rates.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastplug.layers.expansion import expand_blocks
    from fastplug.layers.linear import QuantLinear
    from fastplug.layers.loading import load
    from fastplug.layers.lora import LoRALinear
    from fastplug.layers.loraplus import loraplus_groups
    from fastplug.layers.quantizing import dequantize_, quantize, quantize_
    from fastplug.layers.saving import save

_HOME = {
    "LoRALinear": "lora",
    "QuantLinear": "linear",
    "dequantize_": "quantizing",
    "expand_blocks": "expansion",
    "load": "loading",
    "loraplus_groups": "loraplus",
    "quantize": "quantizing",
    "quantize_": "quantizing",
    "save": "saving",
}

__all__ = [
    "LoRALinear",
    "QuantLinear",
    "dequantize_",
    "expand_blocks",
    "load",
    "loraplus_groups",
    "quantize",
    "quantize_",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastplug.layers' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastplug.layers.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
