"""Whether PEFT's adapters fit the layers that they are on: asked once, when a model is patched."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastplug.errors import ModelError
from fastplug.sharding import whole


def check_adapters(model: nn.Module) -> None:
    """Raise :class:`ModelError` for the first LoRA matrix whose shape does not fit its layer.

    PEFT loads adapters into matrices of the right shape; one that was put there by hand, or whose base was exchanged,
    would fail in the first step, with a message of the matrix product.
    """
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
            base: Any = layer.base_layer
            inputs, outputs = getattr(base, "in_features", None), getattr(base, "out_features", None)
            single = hasattr(base, "weight")  # a module of experts holds several, each of its own shape
            if single and isinstance(inputs, int) and isinstance(outputs, int):
                _check_layer(name, layer, inputs, outputs)


def _check_layer(name: str, layer: Any, in_features: int, out_features: int) -> None:
    for adapter in layer.lora_A:
        if adapter not in layer.lora_B:
            continue
        a, b = layer.lora_A[adapter], layer.lora_B[adapter]
        if type(a) is not nn.Linear or type(b) is not nn.Linear or not (whole(a.weight, 2) and whole(b.weight, 2)):
            continue
        rank = a.weight.shape[0]
        expected: dict[str, tuple[torch.Tensor, tuple[int, ...]]]
        expected = {"lora_A": (a.weight, (rank, in_features)), "lora_B": (b.weight, (out_features, rank))}
        magnitudes = getattr(layer, "lora_magnitude_vector", None) or {}
        if adapter in magnitudes and whole(getattr(magnitudes[adapter], "weight", None), 1):
            expected["magnitude"] = (magnitudes[adapter].weight, (out_features,))
        for what, (found, shape) in expected.items():
            if tuple(found.shape) != shape:
                raise ModelError(
                    f"fastplug.apply: {name} has a {what} of adapter {adapter!r} of shape {tuple(found.shape)} over a "
                    f"layer of {in_features} inputs and {out_features} outputs, where it has to be {shape}; the "
                    "adapter belongs to another base model, or was changed after it was loaded"
                )
