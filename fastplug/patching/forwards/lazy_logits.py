"""Logits that are computed if somebody reads them.

A training step needs the loss, not the logits, and they are the largest tensor of the step. Evaluation with metrics,
a custom loss or an older TRL read them all the same: then they are computed from the hidden states by the model's own
head, with the graph that gradients need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


class LazyLogits(torch.Tensor):
    """Stands for ``head(hidden_states)`` [B, S, V] and behaves as that tensor from the first use on.

    A tensor without storage, since libraries sort what a model returns by ``isinstance(value, torch.Tensor)``. Until
    it is computed, it tells its shape, dtype and device, and that it is no part of a graph: wrappers such as DDP ask
    every output for that.
    """

    _compute: Callable[[], torch.Tensor] | None
    _value: torch.Tensor | None

    @staticmethod
    def __new__(
        cls, compute: Callable[[], torch.Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> LazyLogits:
        made: LazyLogits = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        made._compute, made._value = compute, None
        return made

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def tensor(self) -> torch.Tensor:
        """The logits, computed once."""
        if self._value is None:
            assert self._compute is not None
            self._value = self._compute()
            self._compute = None  # lets go of the hidden states
        return self._value

    def float(self) -> LazyLogits:
        """The logits in fp32, still not computed: accelerate hands on all outputs of an autocast region so."""
        return LazyLogits(lambda: self.tensor().float(), self.shape, torch.float32, self.device)

    @property
    def computed(self) -> bool:
        return self._value is not None

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in _KNOWN and isinstance(args[0], LazyLogits) and not args[0].computed:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        if function is torch.Tensor.float and not args[0].computed:  # accelerate's, on all that autocast put out
            lazy: LazyLogits = args[0]
            return cls(lambda: lazy.tensor().float(), lazy.shape, torch.float32, lazy.device)
        args, kwargs = torch.utils._pytree.tree_map(_tensor, (args, dict(kwargs or {})))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What C++ does with the tensor (a collective, say), past ``__torch_function__``."""
        args, kwargs = torch.utils._pytree.tree_map(_tensor, (args, dict(kwargs or {})))
        return function(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _identity, (self.tensor(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.tensor().clone()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        state = "computed" if self.computed else "computed when read"
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, {state})"


# What is known without the numbers.
_KNOWN = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "requires_grad", "grad_fn", "is_leaf")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__, torch.Tensor.is_floating_point}


def _tensor(value: Any) -> Any:
    return value.tensor() if isinstance(value, LazyLogits) else value


def _identity(value: Any) -> Any:
    return value
