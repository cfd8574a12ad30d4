"""Whether a layer is what it was: the same submodules, attributes, hooks, adapters, and tensors at one address."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Fingerprint:
    """A snapshot of all state that the forward of a layer may read, compared by identity.

    Dictionaries are compared by the interpreter itself, which looks at identity first: about 1 us a module.
    """

    def __init__(self, layer: nn.Module) -> None:
        tensors = [*layer.parameters(), *layer.buffers()]
        owners: list[dict[str, Any]] = [module.__dict__ for module in layer.modules()]
        for tensor in tensors:
            owners.extend(_attached(tensor.__dict__))
        self._states = [(state, _copy(state)) for state in owners]
        for state in owners:
            tensors.extend(value for value in state.values() if isinstance(value, torch.Tensor))
        self._tensors = [(tensor, tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]
        # What was derived from a frozen weight (its FP8 form) is made anew, elsewhere, once the weight was written to.
        self._frozen = [(p, p._version) for p in layer.parameters() if not p.requires_grad and not p.is_inference()]

    def holds(self, layer: nn.Module) -> bool:
        """Whether ``layer`` is the one of the snapshot (no copy or replica of it), and nothing has changed since."""
        if self._states[0][0] is not layer.__dict__:
            return False
        try:
            same = all(state == before for state, before in self._states) and self.pointers_hold()
            return same and all(frozen._version == version for frozen, version in self._frozen)
        except (RuntimeError, TypeError, ValueError):  # an array took the place of another: no truth value
            return False

    def pointers_hold(self) -> bool:
        """Whether every tensor still lies where it lay: hosts that shard weights free and gather them again."""
        return all(
            tensor.data_ptr() == pointer and tensor.requires_grad is needs_grad
            for tensor, pointer, needs_grad in self._tensors
        )


def _attached(state: dict[str, Any], depth: int = 3) -> Iterator[dict[str, Any]]:
    """What hangs on a tensor as attributes (bitsandbytes' quantization state), and on those in turn."""
    if not state:
        return
    yield state
    for value in state.values():
        if depth and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, torch.Tensor, type)):
            yield from _attached(value.__dict__, depth - 1)


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.copy() if isinstance(value, (dict, list, set)) else value for key, value in state.items()}
