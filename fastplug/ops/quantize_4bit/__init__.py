"""Quantizing weights to bitsandbytes' 4-bit formats, bit for bit as bitsandbytes does on that device, without it."""

from __future__ import annotations

from typing import Any

import torch


def implementation(device: torch.device) -> Any:
    """The module that quantizes on ``device``: Triton's on a GPU that has it, else the reference."""
    from fastplug.devices import kernel_reason
    from fastplug.ops.quantize_4bit import reference

    if device.type == "cpu" or kernel_reason(device) is not None:
        return reference
    from fastplug.ops.quantize_4bit import kernel

    return kernel
