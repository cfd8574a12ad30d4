"""Counting the tokens of a Trainer's batches, which no event of the Trainer shows to a callback."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from fastplug.metrics import Meter


class TokenCounter:
    """A forward pre-hook that gives the tokens of training batches to a :class:`~fastplug.metrics.Meter`.

    It sits on the outermost model, so it runs once per micro-batch and not again where gradient checkpointing
    recomputes the layers.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._handle: Any = None

    def attach(self, model: nn.Module) -> None:
        self.detach()
        self._handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):  # evaluation, generation, a reference model's pass
            return
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds", args[0] if args else None)
        if isinstance(tokens, torch.Tensor):
            self._meter.count(tokens, kwargs.get("attention_mask"))

    def __reduce__(self) -> Any:
        # A model saved whole in mid-training must load where fastplug is not installed; this does nothing.
        return getattr, (contextlib.nullcontext(), "__exit__")
