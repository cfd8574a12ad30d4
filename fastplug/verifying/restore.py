"""What a verification changes for its duration. Each context manager puts everything back, whatever happens inside."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastplug.patching.bind import unbind
from fastplug.patching.sites import KEY, Binding

SEED = 20
LORA_STD = 0.02  # of a randomised LoRA B: makes the update a few percent of the base's output


@contextlib.contextmanager
def originals(modules: list[nn.Module]) -> Iterator[None]:
    """Run the modules' original forwards; the same bindings are set again afterwards."""
    bound = [(module, type(module), dict(module.__dict__)) for module in modules if KEY in module.__dict__]
    try:
        for module, _, _ in bound:
            unbind(module)
        yield
    finally:
        for module, kind, state in bound:
            module.__class__ = kind
            module.__dict__[KEY] = state[KEY]
            module.__dict__.pop("forward", None)  # transformers 4.57 leaves a bound copy of the original there
            if "forward" in state:
                module.__dict__["forward"] = state["forward"]


@contextlib.contextmanager
def random_state(device: torch.device) -> Iterator[None]:
    """Give back the random number generators of the CPU and of every device of the model's kind."""
    kind = device.type if device.type in ("cuda", "xpu") else "cuda"
    backend: Any = getattr(torch, kind)
    devices = list(range(backend.device_count())) if backend.is_available() else []
    with torch.random.fork_rng(devices, device_type=kind):
        yield


@contextlib.contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Training mode by the flag alone: ``train()`` has side effects in some hosts."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = True
        yield
    finally:
        for module, flag in before:
            module.training = flag


@contextlib.contextmanager
def gradients(model: nn.Module) -> Iterator[None]:
    """Set ``.grad`` aside, and the hooks that would act on a finished gradient (an optimizer inside the backward)."""
    before = [(p, p.grad, dict(_hooks(p))) for p in model.parameters()]
    try:
        for parameter, _, hooks in before:
            parameter.grad = None
            if hooks:
                _hooks(parameter).clear()  # the dict itself is what the backward looks into
        yield
    finally:
        for parameter, grad, hooks in before:
            parameter.grad = grad
            _hooks(parameter).update(hooks)


def _hooks(parameter: nn.Parameter) -> dict[int, Any]:
    hooks: dict[int, Any] | None = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return {} if hooks is None else hooks


@contextlib.contextmanager
def attributes(model: nn.Module, name: str, value: Any, kinds: type | tuple[type, ...] = nn.Module) -> Iterator[None]:
    """Another value for an attribute of every module of these kinds that has it set to something true."""
    before = [
        (module, module.__dict__[name])
        for module in model.modules()
        if isinstance(module, kinds) and module.__dict__.get(name)
    ]
    try:
        for module, _ in before:
            module.__dict__[name] = value
        yield
    finally:
        for module, old in before:
            module.__dict__[name] = old


@contextlib.contextmanager
def randomised_lora(model: nn.Module) -> Iterator[list[str]]:
    """Random values in trainable LoRA tensors that are zero (a new B makes dA zero, whatever the code does).

    The storage is swapped, so the old one comes back untouched. Yields the tensors' names.
    """
    changed: list[tuple[nn.Parameter, torch.Tensor]] = []
    names = []
    generator = torch.Generator().manual_seed(SEED)
    try:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" in name and parameter.dim() >= 2 and not bool(parameter.any()):
                noise = torch.randn(parameter.shape, generator=generator) * LORA_STD
                changed.append((parameter, parameter.data))
                parameter.data = noise.to(parameter.device, parameter.dtype)
                names.append(name)
        yield names
    finally:
        for parameter, data in changed:
            parameter.data = data


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """No TF32 in fp32 products: the judge must be more exact than what it judges."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def fallback_counts(model: nn.Module) -> Iterator[None]:
    """The calls of a verification do not count in the report."""
    bindings: list[Binding] = [module.__dict__[KEY] for module in model.modules() if KEY in module.__dict__]
    before = [Counter(binding.fallbacks) for binding in bindings]
    try:
        yield
    finally:
        for binding, counts in zip(bindings, before):
            binding.fallbacks.clear()
            binding.fallbacks.update(counts)
