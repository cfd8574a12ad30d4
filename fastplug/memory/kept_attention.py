"""Keep attention's output while the rest of a layer is computed again.

``torch.utils.checkpoint`` throws away what the nodes of a region save, and computes the region again for it. Attention
saves q, k and v, which follow from the layer's input, and its output and logsumexp, which take as long as attention
itself to get again: most of the layer from 16,000 tokens on. So attention runs under hooks of its own in the first
pass: what shares memory with q, k or v goes to the checkpoint's hook, everything else stays. In the second pass
attention does not run: q, k and v are handed to the checkpoint in the same order, and the kept output goes on. The
backward is the one that autograd recorded in the first pass, whichever kernel that was: the same kernel, the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from fastplug.memory.offload import Group
from fastplug.ops.recompute import checkpointing, recomputing

KERNELS = ("sdpa", "flash_attention_2", "flash_attention_3")


def refusal(implementation: str, dropout: float) -> str | None:
    """Why attention of this name (in the model's config) cannot be kept, or None.

    An implementation that keeps the matrix of weights has more to keep than there is to gain, and dropout would have to
    draw its mask again.
    """
    if dropout:
        return "attention has dropout"
    if implementation not in KERNELS:
        return f"attention is {implementation!r}, none of {', '.join(map(repr, KERNELS))}"
    return None


@dataclass
class _Call:
    """One call of attention in the first pass: its result, and what of q, k, v it saved, in that order."""

    result: Any
    requires_grad: bool
    parts: list[tuple[int, torch.Size, tuple[int, ...], int]]


class Attentions:
    """The attention of one run of one layer, called once or more.

    Args:
        group: Where what is kept goes, or None to leave it on the device.
    """

    def __init__(self, group: Group | None = None) -> None:
        self._group = group
        self._calls: list[_Call | None] = []
        self._again: Iterator[_Call | None] | None = None

    def first(self) -> AbstractContextManager[None]:
        """Around the first pass."""
        return _Pass(self, again=False)

    def second(self) -> AbstractContextManager[None]:
        """Around each recomputation: of several, where the graph is retained."""
        return _Pass(self, again=True)

    def begin_again(self) -> None:
        self._again = iter(self._calls)

    @property
    def kept(self) -> int:
        """How many calls of attention are kept."""
        return sum(call is not None for call in self._calls)

    def run(self, function: Callable[..., Any], inputs: Sequence[torch.Tensor], args: Any, kwargs: Any) -> Any:
        """``function(*args, **kwargs)``, whose ``inputs`` are q, k and v, or what it gave in the first pass."""
        if recomputing() and self._again is not None:
            call = next(self._again)
            return function(*args, **kwargs) if call is None else self._replayed(call, inputs)
        if checkpointing() != "checkpointed":
            return function(*args, **kwargs)
        if not any(part.requires_grad for part in inputs):
            self._calls.append(None)
            return function(*args, **kwargs)
        outer_pack, outer_unpack = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[misc]
        parts: list[tuple[int, torch.Size, tuple[int, ...], int]] = []
        present = list(inputs)  # emptied below: autograd holds on to both hooks

        def pack(tensor: torch.Tensor) -> tuple[bool, Any]:
            part = _part(tensor, present)
            if part is None:
                return False, self._keep(tensor)
            parts.append(part)
            return True, outer_pack(tensor)

        def unpack(packed: tuple[bool, Any]) -> torch.Tensor:
            given, value = packed
            return outer_unpack(value) if given else self._read(value)  # type: ignore[no-any-return]

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            result = function(*args, **kwargs)
        present.clear()
        several = result if isinstance(result, tuple) else (result,)
        kept = [self._keep(value) if isinstance(value, torch.Tensor) else value for value in several]
        needs = any(isinstance(value, torch.Tensor) and value.requires_grad for value in several)
        self._calls.append(_Call(tuple(kept) if isinstance(result, tuple) else kept[0], needs, parts))
        return result

    def _replayed(self, call: _Call, inputs: Sequence[torch.Tensor]) -> Any:
        outer_pack = torch._C._autograd._top_saved_tensors_default_hooks(True)[0]  # type: ignore[index]
        for i, size, stride, offset in call.parts:
            x = inputs[i].detach()
            outer_pack(x.as_strided(size, stride, x.storage_offset() + offset))
        if not isinstance(call.result, tuple):
            return self._read(call.result).requires_grad_(call.requires_grad)
        read = [value if value is None else self._read(value) for value in call.result]
        return tuple(v.requires_grad_(call.requires_grad) if isinstance(v, torch.Tensor) else v for v in read)

    def _keep(self, tensor: torch.Tensor) -> Any:
        return tensor.detach() if self._group is None else self._group.pack(tensor)

    def _read(self, kept: Any) -> torch.Tensor:
        found: torch.Tensor = kept if self._group is None else self._group.unpack(kept)
        return found.detach()


_CURRENT: ContextVar[Attentions | None] = ContextVar("fastplug_attentions", default=None)


class _Pass:
    def __init__(self, attentions: Attentions, again: bool) -> None:
        self._attentions, self._repeats = attentions, again
        self._tokens: list[Token[Attentions | None]] = []

    def __enter__(self) -> None:
        if self._repeats:
            self._attentions.begin_again()
        self._tokens.append(_CURRENT.set(self._attentions))

    def __exit__(self, *error: object) -> None:
        _CURRENT.reset(self._tokens.pop())


def _part(tensor: torch.Tensor, inputs: Sequence[torch.Tensor]) -> tuple[int, torch.Size, tuple[int, ...], int] | None:
    """Which input a saved tensor is a view of, and which view."""
    address = tensor.untyped_storage().data_ptr()
    if not tensor.numel() or not address:
        return None
    views = [i for i, x in enumerate(inputs) if x.dtype == tensor.dtype and x.untyped_storage().data_ptr() == address]
    if not views:
        return None
    i = next((i for i in views if inputs[i].data_ptr() == tensor.data_ptr()), views[0])
    return i, tensor.size(), tensor.stride(), int(tensor.storage_offset() - inputs[i].storage_offset())


class _Intercept(TorchFunctionMode):
    """Hands calls of PyTorch's attention to :class:`Attentions`, wherever a model's attention function makes them.

    There k and v are what the kernel reads, also where transformers has repeated the heads.
    """

    def __init__(self, attentions: Attentions) -> None:
        super().__init__()
        self._attentions = attentions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        inputs = [*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)][:3]
        if torch._fused_sdp_choice(*args, **kwargs) == SDPBackend.MATH.value:
            return func(*args, **kwargs)  # it keeps the weights: computed again like everything else
        return self._attentions.run(func, inputs, args, kwargs)


def keeping_sdpa() -> AbstractContextManager[Any]:
    """Around a model's attention function: its calls of PyTorch's attention are kept where a policy says so."""
    attentions = None if torch.compiler.is_compiling() else _CURRENT.get()
    return nullcontext() if attentions is None else _Intercept(attentions)


def keep(function: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> Any:
    """``function(q, k, v, *args)``, an attention with a kernel of its own, kept where a policy says so."""
    attentions = None if torch.compiler.is_compiling() else _CURRENT.get()
    if attentions is None:
        return function(q, k, v, *args)
    return attentions.run(function, (q, k, v), (q, k, v, *args), {})


__all__ = ["Attentions", "keep", "keeping_sdpa", "refusal"]
