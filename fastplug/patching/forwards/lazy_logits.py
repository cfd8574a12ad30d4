"""Logits that are computed if somebody reads them.

A training step needs the loss, not the logits, and they are the largest tensor of the step. Evaluation with metrics,
a custom loss or an older TRL read them all the same: then they are computed from the hidden states by the model's own
head, with the graph that gradients need.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch


class LazyLogits:
    """Stands for ``head(hidden_states)`` [B, S, V] and behaves as that tensor from the first use on."""

    def __init__(self, compute: Callable[[], torch.Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        self._compute: Callable[[], torch.Tensor] | None = compute
        self._value: torch.Tensor | None = None
        self.shape = shape
        self.dtype = dtype

    def tensor(self) -> torch.Tensor:
        """The logits, computed once."""
        if self._value is None:
            assert self._compute is not None
            self._value = self._compute()
            self._compute = None  # lets go of the hidden states
        return self._value

    @property
    def computed(self) -> bool:
        return self._value is not None

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = torch.utils._pytree.tree_map(_tensor, (args, dict(kwargs or {})))
        return function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy, pickle and numpy probe for protocols: those do not need the numbers
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Any:
        return iter(self.tensor())

    def __reduce__(self) -> Any:
        return _identity, (self.tensor(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.tensor().clone()

    def __repr__(self) -> str:
        state = "computed" if self.computed else "computed when read"
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, {state})"

    __hash__ = object.__hash__


def _tensor(value: Any) -> Any:
    return value.tensor() if isinstance(value, LazyLogits) else value


def _identity(value: Any) -> Any:
    return value


def _delegate(name: str) -> Callable[..., Any]:
    def method(self: LazyLogits, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*(_tensor(argument) for argument in args))

    return method


_UNARY = ("neg", "abs", "invert", "pos")
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
for _name in (*_UNARY, *_BINARY, "eq", "ne", "lt", "le", "gt", "ge", "getitem", "setitem", "contains"):
    assert hasattr(operator, _name) or hasattr(operator, f"{_name}_")
    setattr(LazyLogits, f"__{_name}__", _delegate(f"__{_name}__"))
for _name in _BINARY:
    setattr(LazyLogits, f"__r{_name}__", _delegate(f"__r{_name}__"))
for _name in ("float", "int", "bool", "array"):
    setattr(LazyLogits, f"__{_name}__", _delegate(f"__{_name}__"))
