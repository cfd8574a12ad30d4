"""Encoded weights, looked at once: what is wrong with their shapes and values, before the first step is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fastplug.errors import ModelError
from fastplug.quant.codec import Codec, Damaged, EncodedWeight
from fastplug.quant.incomplete import sharded


def check_weights(model: nn.Module, codec_of: Callable[[nn.Module], Codec | None]) -> list[str]:
    """What the codecs of a model have to note, after a look at all weights and at the values of those they can read.

    Waits for the device once.

    Raises:
        ModelError: The parts of a weight contradict each other, its scales are not finite, or an index is beyond its
            groups; the first module is named.
    """
    notes: list[str] = []
    found: list[tuple[str, torch.Tensor, str]] = []
    for name, module in model.named_modules():
        codec: Any = codec_of(module)
        encoded = None if codec is None else codec.read(module)
        if isinstance(encoded, Damaged) and not sharded(module):
            raise ModelError(
                f"fastplug: the quantized weight of {name} is damaged: {encoded}; load or quantize the model again"
            )
        if not isinstance(encoded, EncodedWeight):
            continue
        note, problems = getattr(codec, "note", None), getattr(codec, "problems", None)
        if note and note not in notes:
            notes.append(note)
        if problems:
            found.extend((name, flag, what) for flag, what in problems(encoded, module))
    for name, what in wrong(found):
        raise ModelError(
            f"fastplug: the quantized weight of {name} has {what}; its file is damaged or was written by another "
            "version of its library: load or quantize the model again"
        )
    return notes


def wrong(found: list[tuple[str, torch.Tensor, str]]) -> Iterator[tuple[str, str]]:
    """The names and problems whose flags are true, with one wait for each device."""
    by_device: dict[torch.device, list[tuple[str, torch.Tensor, str]]] = {}
    for item in found:
        by_device.setdefault(item[1].device, []).append(item)
    for items in by_device.values():
        flags = torch.stack([flag.reshape(()) for _, flag, _ in items]).tolist()
        yield from ((name, what) for (name, _, what), flag in zip(items, flags) if flag)
