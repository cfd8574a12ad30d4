"""Bytes of a training step outside of the layers, from shapes: what is always there, the head with its loss, inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fastplug.memory.shapes import ModelShape
from fastplug.ops.logprobs.chunked import chunks


def head_peak(shape: ModelShape, batch: int, length: int) -> dict[str, int]:
    """Bytes by name that head and loss need beside what the layers keep."""
    T, H, V = batch * length, shape.hidden, shape.vocabulary
    c = shape.compute_itemsize if shape.head_itemsize == 4 and shape.compute_itemsize == 2 else shape.head_itemsize
    rows, columns = _chunk(T, V, c, bool(shape.head_trained))
    found = {
        "logits": rows * columns * c,
        "hidden states": T * H * (2 * shape.stream_itemsize + c) + 24 * T,  # last residual, normalized, their gradient
        "head": V * H * c if shape.head_itemsize != c else 0,
    }
    if shape.head_trained:
        several = rows < T
        found["head"] += V * H * (4 + shape.head_itemsize if several else c)
    return found


def _chunk(tokens: int, vocabulary: int, itemsize: int, trained: bool) -> tuple[int, int]:
    """Rows and columns of the buffer that the logits live in."""
    dtype = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    parts = chunks(tokens, vocabulary, dtype, torch.device("cuda"), None, halves=not trained)
    return (parts[0].stop if parts else 0), -(-vocabulary // 64) * 64


OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "lion_8bit", "sgd", "adafactor", "none")


def optimizer_bytes(trained: Iterable[tuple[int, int]], optimizer: str) -> int:
    """Bytes of states on the device, for (elements, bytes of one) of what is trained.

    PyTorch keeps states in the parameter's dtype, two of them for AdamW. bitsandbytes' 8-bit states have an fp32 scale
    for each 256; its paged states lie in host memory as long as the device is full. Adafactor keeps rows and columns.
    """
    states = {"adamw": 2, "adamw_8bit": 2, "lion": 1, "lion_8bit": 1}.get(optimizer, 0)
    eight = optimizer.endswith("8bit")
    return int(sum(count * states * (1 + 4 / 256 if eight else itemsize) for count, itemsize in trained))


def fixed_bytes(shape: ModelShape, optimizer: str = "adamw") -> dict[str, int]:
    """Bytes by name that are there at every moment of training, the gradients of the layers left out."""
    adapters = shape.adapter_bytes
    found = {
        "weights": shape.weight_bytes,
        "adapters": adapters,
        "optimizer": optimizer_bytes(shape.trained, optimizer),
    }
    return {name: size for name, size in found.items() if size}


def step_bytes(shape: ModelShape, batch: int, length: int) -> int:
    """Bytes of a step that all layers share: tokens, labels, positions, cos and sin, masks of windows."""
    head_dim = max(layer.head_dim for layer in shape.layers)
    kinds = len({layer.window for layer in shape.layers})
    masks = sum(length**2 for window in {layer.window for layer in shape.layers} if window and length > window)
    mask = masks if shape.attention in ("sdpa", "eager") else 0
    return 32 * batch * length + kinds * 2 * length * head_dim * shape.stream_itemsize + mask


__all__ = ["OPTIMIZERS", "fixed_bytes", "head_peak", "optimizer_bytes", "step_bytes"]
