"""Whether a layer is what it was: the same submodules, attributes, hooks, adapters, and tensors at one address."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Fingerprint:
    """A snapshot of all state that the forward of a layer may read, compared by identity.

    Dictionaries are compared by the interpreter itself, which looks at identity first: about 1 us a module. No tensor
    stays alive for it: weights that are replaced, in a merge say, are freed as without it.
    """

    def __init__(self, layer: nn.Module) -> None:
        tensors = [*layer.parameters(), *layer.buffers()]
        self._own = [weakref.ref(tensor) for tensor in tensors]
        owners: list[dict[str, Any]] = [module.__dict__ for module in layer.modules()]
        for tensor in tensors:
            owners.extend(_attached(tensor.__dict__))
        self._states, self._before = owners, [_copy(state) for state in owners]
        for state in owners:
            tensors.extend(value for value in state.values() if isinstance(value, torch.Tensor))
        self._tensors = [(weakref.ref(tensor), tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]
        # What was derived from a frozen weight (its FP8 form) is made anew, elsewhere, once the weight was written to.
        frozen = [p for p in layer.parameters() if not p.requires_grad and not p.is_inference()]
        self._frozen = [(weakref.ref(p), p._version) for p in frozen]

    def holds(self, layer: nn.Module) -> bool:
        """Whether ``layer`` is the one of the snapshot (no copy or replica of it), and nothing has changed since."""
        if self._states[0] is not layer.__dict__:
            return False
        try:
            same = self._before == self._states and self.pointers_hold()
        except (RuntimeError, TypeError, ValueError):  # an array took the place of another: no truth value
            return False
        with torch._C.DisableTorchFunctionSubclass():
            return same and all(ref()._version == version for ref, version in self._frozen)  # type: ignore[union-attr]

    def pointers_hold(self) -> bool:
        """Whether every tensor still lies where it lay: hosts that shard weights free and gather them again."""
        with torch._C.DisableTorchFunctionSubclass():  # Params4bit runs Python at every use of it
            for ref, pointer, needs_grad in self._tensors:
                tensor = ref()
                if tensor is None or tensor.data_ptr() != pointer or tensor.requires_grad is not needs_grad:
                    return False
        return True

    def of_tensors_in(self, layer: nn.Module) -> bool:
        """Whether the layer still has all parameters and buffers, so that this state of it may come back."""
        there = {id(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
        return all(id(ref()) in there for ref in self._own)


class _Same:
    """Equal to one tensor, which it does not keep alive."""

    __slots__ = ("_ref",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self._ref = weakref.ref(tensor)

    def __eq__(self, other: object) -> bool:
        return self._ref() is other and other is not None

    __hash__ = None  # type: ignore[assignment]


def _attached(state: dict[str, Any], depth: int = 3) -> Iterator[dict[str, Any]]:
    """What hangs on a tensor as attributes (bitsandbytes' quantization state), and on those in turn."""
    if not state:
        return
    yield state
    for value in state.values():
        if depth and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, torch.Tensor, type)):
            yield from _attached(value.__dict__, depth - 1)


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    """What stands on the left of a comparison: with tensors by reference, one level of containers down as well."""
    return {key: _entry(value) for key, value in state.items()}


def _entry(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _Same(value)
    if type(value) is dict:
        return {key: _Same(each) if isinstance(each, torch.Tensor) else each for key, each in value.items()}
    return value.copy() if isinstance(value, (dict, list, set)) else value
