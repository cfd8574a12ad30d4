"""What a device can do, asked in one place."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def interpreting() -> bool:
    """Whether Triton was told to interpret its kernels on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def triton_reason() -> str | None:
    """Why Triton cannot be imported here, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton; it exists for Linux only)"
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # a broken install must not break the reference path
        return f"triton cannot be imported: {error}"
    return None


def kernel_reason(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of ``device``, or None if they can."""
    reason = triton_reason()
    if reason is not None:
        return reason
    if device.type == "cpu":
        return None if interpreting() else "Triton has no CPU backend: the PyTorch reference runs"
    if device.type in ("cuda", "xpu"):  # ROCm devices are called cuda by torch
        return None
    return f"fastplug has no Triton kernels for {device.type}: the PyTorch reference runs"
