"""The mask of packed rows as a tensor that is made only if somebody reads it.

transformers hands one 4-dimensional mask to every layer. fastplug's attention needs only what the mask stands for, so
the [B, 1, S, S] numbers are never made where every layer is fused. Whatever else reads it (a layer that runs as it is,
a hook, another attention function) finds the mask itself: no path can overlook that the row is packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastplug.ops.document_attention.documents import Documents
from fastplug.ops.lazy import KNOWN, LazyTensor


class DocumentMask(LazyTensor):
    """Stands for ``documents.mask(window)``, bool [B, 1, S, S], true where a query may see a key."""

    documents: Documents
    window: int | None

    @staticmethod
    def __new__(cls, documents: Documents, window: int | None = None) -> DocumentMask:
        shape = torch.Size((documents.rows, 1, documents.length, documents.length))
        made: DocumentMask = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=torch.bool, device=documents.cu_seqlens.device
        )
        made.documents, made.window = documents, window
        return made

    def tensor(self) -> torch.Tensor:
        """The mask itself, made once per step."""
        return self.documents.mask(self.window)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in _KNOWN and isinstance(args[0], DocumentMask):
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        if function in _SAME and isinstance(args[0], DocumentMask) and _stays(args[0], args[1:], kwargs):
            return args[0]
        return cls.on_the_numbers(function, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.tensor().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> DocumentMask:
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DocumentMask(shape={tuple(self.shape)}, documents={len(self.documents.cu_seqlens) - 1})"


# Gradient checkpointing writes requires_grad on what it keeps.
_GRAD: Any = torch.Tensor.grad
_REQUIRES_GRAD: Any = torch.Tensor.requires_grad
_KNOWN = KNOWN | {_GRAD.__get__, _REQUIRES_GRAD.__set__}
_SAME = {torch.Tensor.detach, torch.Tensor.contiguous, torch.Tensor.to}


def _stays(mask: DocumentMask, wanted: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> bool:
    """Whether ``detach()``, ``contiguous()`` or ``to(...)`` asks for what the mask is already."""
    return not kwargs and all(value in (mask.device, mask.dtype) for value in wanted)


__all__ = ["DocumentMask"]
