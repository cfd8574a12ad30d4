"""Compare a fast forward with the module's own, on random input, before a guess by structure is kept."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastplug.patching.bind import MARK, parameter_names
from fastplug.patching.forwards.shared_input import standing_in
from fastplug.patching.report import Report
from fastplug.patching.samples import Samples, tokens
from fastplug.patching.sites import Binding, Implementation, NotCovered, Runtime, Site
from fastplug.sharding import SHARDED, distributed

# Relative to the largest value. A wrong structure is off by far more; both sides round in the same dtype.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
ELEMENTS = 1 << 24  # of gradients that a check asks for


def check(site: Site, implementation: Implementation, runtime: Runtime, samples: Samples) -> str | None:
    """Why the guess is wrong, or None: outputs and gradients of both forwards match."""
    module = site.module
    if any(parameter.is_meta for parameter in module.parameters()):
        return None  # a preview: nothing can be checked before the weights are there
    if any(distributed(parameter) or not parameter.numel() for parameter in module.parameters()):
        return f"it cannot be checked: one of its weights {SHARDED}"
    if runtime.fp8 is not None:
        runtime = dataclasses.replace(runtime, fp8=None)  # what is checked is the structure
    base = vars(type(module)).get(MARK, type(module))
    report = Report("", "", {})
    binding = Binding(base, site.name, site.family, runtime, implementation.name, report, parameter_names(base))
    try:
        with _quiet(samples.model if site.role == "linear" else module):
            if site.role == "linear":
                return _projections(module, binding, implementation, samples)
            probes = {"norm": _norm, "mlp": _mlp, "lm_head_loss": _loss}
            return probes[site.role](module, binding, implementation)
    except Exception as error:  # whatever a model's own code does on such input, it says the guess does not fit
        return f"checking it by structure failed: {type(error).__name__}: {str(error)[:200]}"


def _norm(module: nn.Module, binding: Binding, implementation: Implementation) -> str | None:
    """On a copy with random weights, in fp32 and in the weight's own dtype."""
    twin = copy.deepcopy(module)
    twin.__dict__.pop("_fastplug", None)
    own = twin.weight.dtype
    assert isinstance(own, torch.dtype)
    with torch.no_grad():
        twin.weight.normal_(1.0, 0.3)  # type: ignore[operator]
    twin.requires_grad_(True)
    for dtype in dict.fromkeys((torch.float32, own, torch.bfloat16)):
        probe = twin.to(dtype)
        width = probe.weight.shape[0]  # type: ignore[union-attr, index]
        x = torch.randn(3, 5, width, device=probe.weight.device, dtype=dtype, requires_grad=True)  # type: ignore[arg-type]
        reason = _compare(probe, binding, implementation, (x,), {}, [x, *probe.parameters()])
        if reason is not None:
            return reason
    return None


def _mlp(module: nn.Module, binding: Binding, implementation: Implementation) -> str | None:
    row = binding.family
    first: Any = getattr(module, row.gate_up[0])
    first = getattr(first, "base_layer", first)
    parameter = next((p for p in module.parameters() if p.is_floating_point() and p.dim() > 1), None)
    dtype = getattr(first, "compute_dtype", None) or (torch.float32 if parameter is None else parameter.dtype)
    weight = getattr(first, "weight", None)  # HQQ's and AWQ's layers have none
    if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.element_size() > 1:
        dtype = weight.dtype
    device = next(iter((*module.parameters(), *module.buffers()))).device
    x = torch.randn(2, 3, first.in_features, device=device, dtype=dtype, requires_grad=True)
    return _compare(module, binding, implementation, (x,), {}, [x, *_trained(module)])


def _loss(module: nn.Module, binding: Binding, implementation: Implementation) -> str | None:
    """A few tokens through the whole model: the loss as a mean, and over a given number of items."""
    ids = tokens(module)
    labels = ids.clone()
    labels[:, 3:5] = -100
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    trained = _trained(module)
    reason = _compare(module, binding, implementation, (), kwargs, trained)
    if reason is None and "kwargs" in str(binding.base.forward.__code__.co_varnames):
        reason = _compare(module, binding, implementation, (), {**kwargs, "num_items_in_batch": 5}, trained)
    return reason


def _projections(module: nn.Module, binding: Binding, implementation: Implementation, samples: Samples) -> str | None:
    """On what the module is called with when the model reads a few tokens."""
    if samples.of(module) is None:
        return "it cannot be checked: a few tokens of text do not reach it"
    with standing_in(module, binding) as groups:
        args, kwargs = samples.of(module) or ((), {})
        binding.base.forward(module, *args, **kwargs)
        if any(group.parts for group in groups):
            return "not all of the projections that seem to read one tensor do"
    binding.fallbacks.clear()
    results = []
    for fast in (True, False):
        args, kwargs = samples.of(module) or ((), {})
        inputs = [x.requires_grad_() for x in tensors((args, kwargs)) if x.is_floating_point()]
        run = implementation.forward if fast else functools.partial(_own, binding.base)
        torch.manual_seed(0)
        results.append(_outcome(run(module, binding, *args, **kwargs), [*inputs, *_trained(module)]))
    return _unlike(*results)


def _own(base: Any, module: nn.Module, binding: Binding, *args: Any, **kwargs: Any) -> Any:
    return base.forward(module, *args, **kwargs)


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in a value of nested tuples, lists and mappings."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def _trained(module: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters, the smallest first, so many that their gradients take little memory."""
    chosen, total = [], 0
    for parameter in sorted((p for p in module.parameters() if p.requires_grad), key=lambda p: p.numel()):
        total += parameter.numel()
        if total > ELEMENTS:
            break
        chosen.append(parameter)
    return chosen


def _compare(
    module: nn.Module,
    binding: Binding,
    implementation: Implementation,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inputs: Sequence[torch.Tensor],
) -> str | None:
    results = []
    for fast in (True, False):
        run = implementation.forward if fast else functools.partial(_own, binding.base)
        torch.manual_seed(0)
        results.append(_outcome(run(module, binding, *args, **kwargs), inputs))
    return _unlike(*results)


Outcome = tuple[list[torch.Tensor], Sequence[torch.Tensor | None]] | str


def _outcome(out: Any, inputs: Sequence[torch.Tensor]) -> Outcome:
    """The floating-point tensors among the outputs, or the loss where there is one, and the gradients of ``inputs``."""
    if isinstance(out, NotCovered):
        return f"the fused path does not cover it: {out.reason}"
    loss = getattr(out, "loss", None)
    values = [x for x in tensors(out if loss is None else loss) if x.is_floating_point()]
    if not values:
        return "its forward does not return what was expected"
    seed = torch.Generator().manual_seed(1)
    total = [(x.float() * torch.randn(x.shape, generator=seed).to(x.device)).sum() for x in values if x.requires_grad]
    gradients: Sequence[torch.Tensor | None] = ()
    if total and inputs:
        gradients = torch.autograd.grad(torch.stack(total).sum(), inputs, allow_unused=True)
    return [x.detach() for x in values], gradients


def _unlike(ours: Outcome, theirs: Outcome) -> str | None:
    if isinstance(ours, str) or isinstance(theirs, str):
        return ours if isinstance(ours, str) else str(theirs)
    if len(ours[0]) != len(theirs[0]) or len(ours[1]) != len(theirs[1]):
        return "its output is not that of its own forward: it has other parts"
    # Some gradients are zero but for rounding (that of a key's bias): they are judged on the scale of the others.
    scales = [float(gradient.abs().max()) for gradient in theirs[1] if gradient is not None and gradient.numel()]
    least = 1e-3 * max(scales, default=0.0)
    for mine, other in zip(ours[0], theirs[0], strict=True):
        reason = _differs(mine, other, 0.0)
        if reason is not None:
            return f"its output is not that of its own forward: {reason}"
    for gradient, its in zip(ours[1], theirs[1], strict=True):
        reason = _differs(gradient, its, least)
        if reason is not None:
            return f"its gradient is not that of its own forward: {reason}"
    return None


def _differs(ours: torch.Tensor | None, theirs: torch.Tensor | None, least: float) -> str | None:
    if ours is None or theirs is None:
        one = theirs if ours is None else ours
        return None if one is None or not one.any() else "one of them has none"
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{tuple(ours.shape)} {ours.dtype} against {tuple(theirs.shape)} {theirs.dtype}"
    scale = max(float(theirs.abs().max()), least)
    error = float((ours.double() - theirs.double()).abs().max())
    allowed = TOLERANCE.get(theirs.dtype, 0.0) * scale
    return None if error <= allowed or error == 0 else f"off by {error:.2e} at a scale of {scale:.2e}"


@contextlib.contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    """Random numbers as they were afterwards; gradients on, autocast off; buffers (running statistics) as they were."""
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.is_cuda})
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    kinds = {p.device.type for p in module.parameters()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.enable_grad())
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
