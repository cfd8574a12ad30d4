"""A tensor without storage, whose numbers are made if somebody reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class LazyTensor(torch.Tensor):
    """Stands for what :meth:`tensor` returns.

    A subclass of ``torch.Tensor``, since libraries sort values by that. Subclasses say in ``__torch_function__`` what
    they answer themselves, with :data:`KNOWN`, and hand everything else to :meth:`on_the_numbers`.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def tensor(self) -> torch.Tensor:
        """The numbers."""
        raise NotImplementedError

    @staticmethod
    def on_the_numbers(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Any:
        """Call a function with all lazy tensors among its arguments made."""
        args, kwargs = torch.utils._pytree.tree_map(_tensor, (args, dict(kwargs or {})))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What C++ does with the tensor (a collective, say), past ``__torch_function__``."""
        return cls.on_the_numbers(function, args, kwargs)


# What is known without the numbers.
KNOWN = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "requires_grad", "grad_fn", "is_leaf")
} | {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.get_device,
    torch.Tensor.__len__,
    torch.Tensor.is_floating_point,
    torch.is_floating_point,
}


def _tensor(value: Any) -> Any:
    return value.tensor() if isinstance(value, LazyTensor) else value
