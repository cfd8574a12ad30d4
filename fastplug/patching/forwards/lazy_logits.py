"""Logits that are computed if somebody reads them.

A training step needs the loss, not the logits, and they are the largest tensor of the step. Evaluation with metrics,
a custom loss or an older TRL read them all the same: then they are computed from the hidden states by the model's own
head, with the graph that gradients need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastplug.ops.lazy import KNOWN, LazyTensor


class LazyLogits(LazyTensor):
    """Stands for ``head(hidden_states)`` [B, S, V] and behaves as that tensor from the first use on.

    A tensor without storage, since libraries sort what a model returns by ``isinstance(value, torch.Tensor)``. Until
    it is computed, it tells its shape, dtype and device, and that it is no part of a graph: wrappers such as DDP ask
    every output for that.
    """

    _compute: Callable[[], torch.Tensor] | None
    _value: torch.Tensor | None
    hidden: torch.Tensor | None
    steps: tuple[float | None, ...]

    @staticmethod
    def __new__(
        cls,
        compute: Callable[[], torch.Tensor],
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        hidden: torch.Tensor | None = None,
        steps: tuple[float | None, ...] = (),
    ) -> LazyLogits:
        """``hidden`` is what the head reads, where the forward that follows is to write down its ``steps``: factors on
        the logits, None for tanh."""
        made: LazyLogits = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        made._compute, made._value, made.hidden, made.steps = compute, None, hidden, steps
        return made

    def tensor(self) -> torch.Tensor:
        """The logits, computed once."""
        if self._value is None:
            assert self._compute is not None
            self._value = self._compute()
            self._compute = None  # lets go of the hidden states
        return self._value

    def float(self) -> LazyLogits:
        """The logits in fp32, still not computed: accelerate hands on all outputs of an autocast region so."""
        return self.then(lambda value: value.float(), (), torch.float32)

    def then(
        self, step: Callable[[torch.Tensor], torch.Tensor], steps: tuple[Any, ...], dtype: torch.dtype | None = None
    ) -> LazyLogits:
        """The result of one more step, not computed either."""
        return LazyLogits(
            lambda: step(self.tensor()), self.shape, dtype or self.dtype, self.device, self.hidden, self.steps + steps
        )

    def factors(self) -> tuple[Any, ...] | None:
        """(scale, softcap): these are softcap · tanh(scale · head(hidden) / softcap); softcap is None without tanh.

        None where the steps are something else.
        """
        before, after, capped = 1.0, 1.0, 0
        for factor in self.steps:
            capped += factor is None
            if factor is not None:
                before, after = (before, after * factor) if capped else (before * factor, after)
        if capped > 1 or self.hidden is None:
            return None
        return (before * after, after) if capped else (before, None)

    @property
    def computed(self) -> bool:
        return self._value is not None

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in KNOWN and isinstance(args[0], LazyLogits) and not args[0].computed:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        dtype = _cast(function, args, kwargs or {})
        if dtype is not None:  # accelerate's, on all that autocast put out, and FSDP2's, on all that a module returns
            return args[0].then(lambda value: value.to(dtype), (), dtype)
        step = _step(function, args, kwargs or {})
        if step is not None:
            return args[0].then(*step)
        return cls.on_the_numbers(function, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _identity, (self.tensor(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.tensor().clone()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        state = "computed" if self.computed else "computed when read"
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, {state})"


# Factors that a forward puts on its logits; True for divisions. In place they give a new value to the same name.
_SCALES = {
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "__imul__", "mul_", "multiply"), False),
    **dict.fromkeys(("div", "__div__", "__truediv__", "__itruediv__", "__idiv__", "div_", "true_divide"), True),
}


def _step(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Callable[[torch.Tensor], torch.Tensor], tuple[float | None]] | None:
    """What a call does to logits whose steps are written down, if it is one of those steps."""
    if kwargs or not args or not isinstance(args[0], LazyLogits) or args[0].computed or args[0].hidden is None:
        return None
    name = getattr(function, "__name__", "")
    if name == "tanh" and len(args) == 1:
        return torch.tanh, (None,)
    if name not in _SCALES or len(args) != 2 or not isinstance(args[1], (int, float)):
        return None
    scalar = args[1]
    if _SCALES[name]:
        return (lambda value: value / scalar), (1.0 / scalar,)
    return (lambda value: value * scalar), (float(scalar),)


def _cast(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a call does no more than cast logits to which are not computed yet."""
    if not args or not isinstance(args[0], LazyLogits) or args[0].computed:
        return None
    if function is torch.Tensor.float:
        return torch.float32
    if function is torch.Tensor.to and len(args) == 2 and not kwargs and isinstance(args[1], torch.dtype):
        return args[1]
    return None


def _identity(value: Any) -> Any:
    return value
