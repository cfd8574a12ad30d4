"""One training step of a model, taken apart, and its comparison with another one's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import fastplug

BOUND = 1e-5  # of the largest value of a tensor: fp32 sums in another order, over two layers forward and backward


@dataclass
class Step:
    """Loss, logits (None where the loss alone was asked for), gradients by parameter, and the model's output."""

    loss: torch.Tensor
    logits: torch.Tensor | None
    gradients: dict[str, torch.Tensor | None]
    output: Any = field(repr=False, default=None)


def step(model: nn.Module, batch: Mapping[str, Any], *, seed: int = 0, logits: bool = True, **kwargs: Any) -> Step:
    """Forward and backward from cleared gradients, with the random numbers of ``seed``."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output = model(**batch, **kwargs)
    read = output.logits.detach().clone() if logits else None
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return Step(output.loss.detach(), read, gradients, output)


def patched(model: nn.Module, **options: Any) -> nn.Module:
    """A patched deep copy of a model, every site of which was bound or had nothing to gain."""
    twin = copy.deepcopy(model)
    applied = fastplug.apply(twin, **options)
    assert not applied.report.refused, applied.report.summary()
    return twin


def fallbacks(model: nn.Module) -> set[str]:
    """The reasons for which calls ran an original forward."""
    return {reason for reasons in fastplug.report(model).fallbacks.values() for reason in reasons}


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference over the largest value of ``truth``; infinite where only one of them is finite."""
    assert value.shape == truth.shape
    assert value.dtype == truth.dtype
    if torch.equal(value, truth) or not truth.numel():
        return 0.0
    difference = float((value.double() - truth.double()).abs().max())
    return difference / float(truth.double().abs().max().clamp_min(1e-30)) if difference == difference else float("inf")


def assert_equal(ours: Step, theirs: Step, bound: float = BOUND) -> None:
    """Loss, logits and every gradient agree; ``bound=0`` asks for the same bits."""
    pairs = {"loss": (ours.loss, theirs.loss), "logits": (ours.logits, theirs.logits)}
    assert ours.gradients.keys() == theirs.gradients.keys()
    pairs.update({name: (grad, theirs.gradients[name]) for name, grad in ours.gradients.items()})
    for name, (mine, other) in pairs.items():
        assert (mine is None) == (other is None), f"{name}: {mine} against {other}"
        if mine is not None and other is not None:
            found = relative(mine, other)
            assert found <= bound, f"{name}: relative difference {found:.2e} above {bound:.0e}"


def assert_parity(model: nn.Module, batch: Mapping[str, Any], bound: float = BOUND, **kwargs: Any) -> nn.Module:
    """A patched copy of the model takes the same step on the fused path alone. Returns the copy."""
    twin = patched(model)
    assert_equal(step(twin, batch, **kwargs), step(model, batch, **kwargs), bound)
    assert not fallbacks(twin), fallbacks(twin)
    return twin
