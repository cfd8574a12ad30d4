"""An optimizer that steps during the backward, so that gradients do not pile up: for full fine-tuning.

A step of full fine-tuning holds a gradient for every weight, as large as the model. But AdamW and its like update each
parameter by itself. So as soon as the backward has completed a parameter's gradient, the parameter is stepped and the
gradient let go: at any time there are the gradients of one fused node and not of the model. Nothing else changes, the
new weights are those of the ordinary optimizer to the last bit.

What needs all gradients at once is then impossible, above all clipping by their common norm. Hosts clip without asking
the optimizer, and would find no gradients and clip nothing. So a used gradient leaves a :class:`UsedGradient` in its
place, without memory, and whoever reads that gets an error that says why. It still knows the gradient's norm, since the
Trainer logs the norm of all of them in every run.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fastplug.errors import OptionError

WHOLE = ("LBFGS",)  # steps that look at all parameters together


class OptimizerInBackward(torch.optim.Optimizer):
    """Steps each parameter within ``backward()``: ``OptimizerInBackward(torch.optim.AdamW(model.parameters()))``.

    Takes the place of the optimizer it is given, with the same parameter groups, state and ``state_dict``: learning
    rate schedulers work on it, and checkpoints go from either to the other.

    Args:
        optimizer: Any optimizer that updates every parameter by its own gradient and state: torch's (but LBFGS),
            bitsandbytes', torchao's.
        accumulation_steps: How many backwards make up one step. Gradients add up until the last of them, whose
            backward steps. Where fewer came (the end of an epoch), ``step()`` does it.

    ``step()`` steps what the backward has not (parameters whose gradient somebody set), after the closure if there is
    one, and forgets all gradients: the next step begins. Dropping the optimizer, or ``remove()``, ends it all.

    Raises:
        OptionError: The optimizer's step looks at all gradients together, ``accumulation_steps`` is no positive whole
            number, or several processes train on one model: the hook would come before their gradients are summed.
        RuntimeError: Later, from whoever reads a gradient that has been used: clipping by a norm that the gradients
            exceed (``max_grad_norm``, ``gradient_clip_val``) or by value, gradient scaling for fp16, or a second
            backward before ``step()``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, accumulation_steps: int = 1) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, OptimizerInBackward):
            raise OptionError(
                f"fastplug: OptimizerInBackward wraps a torch.optim.Optimizer, not {type(optimizer).__name__}"
            )
        if any(kind.__name__ in WHOLE for kind in type(optimizer).__mro__):
            raise OptionError(
                f"fastplug: {type(optimizer).__name__} steps by all gradients together, so it cannot step within the "
                "backward; use it as it is"
            )
        if not isinstance(accumulation_steps, int) or isinstance(accumulation_steps, bool) or accumulation_steps < 1:
            raise OptionError(
                f"fastplug: accumulation_steps must be a positive whole number, not {accumulation_steps!r}"
            )
        self.optimizer, self.accumulation_steps = optimizer, accumulation_steps
        self._seen: Counter[nn.Parameter] = Counter()
        self._handles: dict[nn.Parameter, Any] = {}
        self._lock = threading.RLock()  # every device's part of a backward runs in a thread of its own
        super().__init__(optimizer.param_groups, dict(optimizer.defaults))
        self._share()
        _require_one_process(self._handles)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Run ``closure``, which may hold the backward, and step all that still has a gradient. Its result."""
        with torch.enable_grad():
            result = None if closure is None else closure()
        for parameter in list(self._handles):
            if parameter.grad is not None and not isinstance(parameter.grad, UsedGradient):
                self._step_one(parameter)
            parameter.grad = None
        self._seen.clear()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients. They are never kept as zeros."""
        self._seen.clear()
        for parameter in self._handles:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, which loads into either."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        self.optimizer.load_state_dict(dict(state_dict))
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "optimizer" in self.__dict__ and any(group is param_group for group in self.optimizer.param_groups):
            super().add_param_group(param_group)  # from the constructor, which is given the groups there are
            return
        self.optimizer.add_param_group(param_group)
        self._share()

    def remove(self) -> None:
        """Leave the parameters alone from now on; gradients that have been used are forgotten."""
        for parameter, handle in self._handles.items():
            handle.remove()
            if isinstance(parameter.grad, UsedGradient):
                parameter.grad = None
        self._handles.clear()

    def _share(self) -> None:
        """Take groups and state of the wrapped optimizer for one's own, and watch all parameters."""
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        self._group_of = {parameter: group for group in self.param_groups for parameter in group["params"]}
        for parameter in self._group_of:
            if parameter not in self._handles and parameter.is_leaf and parameter.requires_grad:
                hook = _Hook(self)
                self._handles[parameter] = parameter.register_post_accumulate_grad_hook(hook)

    def _arrived(self, parameter: nn.Parameter) -> None:
        """A backward has added to ``parameter.grad`` all that it will."""
        _require_one_process((parameter,))
        with self._lock:
            self._seen[parameter] += 1
            if self._seen[parameter] >= self.accumulation_steps:
                self._step_one(parameter)

    def _step_one(self, parameter: nn.Parameter) -> None:
        group, gradient = self._group_of[parameter], parameter.grad
        assert gradient is not None
        norm = None if gradient.is_sparse else torch.linalg.vector_norm(gradient)  # before the step: it may change it
        del gradient
        with self._lock:
            groups = self.optimizer.param_groups
            self.optimizer.param_groups = [{**group, "params": [parameter]}]
            try:
                self.optimizer.step()
            finally:
                self.optimizer.param_groups = groups
        parameter.grad = None
        parameter.grad = UsedGradient(parameter, norm)


class _Hook:
    """The hook of a parameter; it does not keep the optimizer alive, and a copy of the model takes none along."""

    def __init__(self, optimizer: OptimizerInBackward | None) -> None:
        self._optimizer = (lambda: None) if optimizer is None else weakref.ref(optimizer)

    def __call__(self, parameter: nn.Parameter) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer._arrived(parameter)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None)


class UsedGradient(torch.Tensor):
    """Stands where a gradient was that a step within the backward has used: it has the gradient's 2-norm and no more.

    Enough for ``clip_grad_norm_``, whose result hosts log, as long as there is nothing to clip.
    """

    norm_before: torch.Tensor | None

    @staticmethod
    def __new__(cls, parameter: torch.Tensor, norm: torch.Tensor | None = None) -> UsedGradient:
        made: UsedGradient = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, parameter.shape, dtype=parameter.dtype, device=parameter.device
        )
        made.norm_before = norm
        return made

    def __init__(self, *args: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        gradient, *rest = args or (None,)
        if isinstance(gradient, UsedGradient) and not kwargs and len(rest) <= 1:
            if function is torch.linalg.vector_norm and rest in ([], [2.0]) and gradient.norm_before is not None:
                return gradient.norm_before
            if function is torch.Tensor.mul_ and _is_one(rest[0]):
                return gradient
        raise _used()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        raise _used()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"UsedGradient(shape={tuple(self.shape)})"


def _is_one(factor: Any) -> bool:
    """Whether a factor on all gradients changes nothing. Waits for the device once for each factor."""
    if not isinstance(factor, torch.Tensor):
        return bool(factor == 1)
    if not hasattr(factor, "_fastplug_is_one"):
        factor._fastplug_is_one = bool(factor == 1)  # type: ignore[attr-defined]
    return factor._fastplug_is_one  # type: ignore[attr-defined, no-any-return]


_HARMLESS = {
    *(getattr(torch.Tensor, name).__get__ for name in "shape dtype device layout ndim requires_grad is_leaf".split()),
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
}


def _used() -> RuntimeError:
    return RuntimeError(
        "fastplug: OptimizerInBackward has used this gradient and let it go. What needs all gradients after the "
        "backward cannot work with it: clipping (set max_grad_norm=0 in a Trainer, leave out gradient_clip_val in "
        "Lightning), gradient scaling (train in bf16 instead of fp16), or a second backward before step() (give "
        "OptimizerInBackward accumulation_steps=N for N backwards a step)"
    )


def _require_one_process(parameters: Any) -> None:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return
    if any(not hasattr(parameter, "device_mesh") for parameter in parameters):  # FSDP2's gradients come summed
        raise OptionError(
            "fastplug: OptimizerInBackward would step before the gradients of several processes are summed; train with "
            "FSDP2, or use the ordinary optimizer"
        )


__all__ = ["OptimizerInBackward", "UsedGradient"]
