"""Head and loss read off the model's own forward as it runs, for forwards that are more than backbone, head and loss.

The original forward runs without labels, over a head that puts out :class:`LazyLogits`. What it does to them (a scale,
a softcap) they write down; the rest of its outputs (image features, router losses) come out as they are. Where it reads
the logits, it gets them, and the model's own loss follows.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import nn

from fastplug.patching.bind import MARK
from fastplug.patching.forwards.labels import Labels
from fastplug.patching.forwards.lazy_logits import LazyLogits
from fastplug.patching.forwards.lm_head_loss import fused_loss, head_of, head_reason, not_covered
from fastplug.patching.projection import base_layer
from fastplug.patching.sites import Binding, Implementation, NotCovered, Runtime, Site

LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")


def forward(model: nn.Module, binding: Binding, *args: Any, **kwargs: Any) -> Any:
    kwargs = {**dict(zip(binding.parameters, args)), **kwargs}
    labels = kwargs.pop("labels", None)
    if labels is None:
        return NotCovered()
    head = head_of(model, binding.family)
    reason = not_covered(model, kwargs) or head_reason(head, binding.runtime)
    if reason is not None:
        return NotCovered(reason)
    assert head is not None
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()  # the lazy logits cannot be traced: see lm_head_loss.py
    if _may_drop_cache(model, binding, kwargs):
        kwargs["use_cache"] = False
    wanted = Labels(labels, kwargs)
    outputs = _with_lazy_head(model, binding, head, kwargs)
    logits = outputs.logits
    factors = logits.factors() if isinstance(logits, LazyLogits) and not logits.computed else None
    if factors is not None:
        loss = fused_loss(head, binding.runtime, logits.hidden, wanted, factors[1], factors[0])
    else:
        logits = logits.tensor() if isinstance(logits, LazyLogits) else logits
        given = {name: kwargs[name] for name in LOSS_ARGUMENTS if name in kwargs}
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **given)  # type: ignore[operator]
    if getattr(outputs, "aux_loss", None) is not None:
        loss = loss + model.router_aux_loss_coef * outputs.aux_loss.to(loss.device)
    values = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    return type(outputs)(**{**values, "loss": loss, "logits": logits})


def _with_lazy_head(model: nn.Module, binding: Binding, head: nn.Module, kwargs: dict[str, Any]) -> Any:
    """The original forward's outputs, whose head's product is not computed."""
    before = head.__dict__.get("forward")

    def lazy(hidden: torch.Tensor) -> LazyLogits:
        autocast = torch.is_autocast_enabled(hidden.device.type)
        dtype = torch.get_autocast_dtype(hidden.device.type)
        grad = torch.is_grad_enabled()

        def compute() -> torch.Tensor:
            _restore(head, before)
            with torch.set_grad_enabled(grad), torch.autocast(hidden.device.type, dtype, enabled=autocast):
                return head(hidden)  # type: ignore[no-any-return]

        width: Any = base_layer(head).out_features
        shape = torch.Size((*hidden.shape[:-1], width))
        return LazyLogits(compute, shape, dtype if autocast else hidden.dtype, hidden.device, hidden)

    head.__dict__["forward"] = lazy
    try:
        return binding.base.forward(model, **kwargs)
    finally:
        _restore(head, before)


def _restore(head: nn.Module, before: Any) -> None:
    head.__dict__.pop("forward", None)
    if before is not None:
        head.__dict__["forward"] = before


def _may_drop_cache(model: nn.Module, binding: Binding, kwargs: dict[str, Any]) -> bool:
    """Whether this is a training step in which nobody reads the key/value cache: see lm_head_loss.py."""
    return (
        "use_cache" in binding.parameters
        and kwargs.get("use_cache") is None
        and torch.is_grad_enabled()
        and model.training
        and not (kwargs.get("attention_mask") is None and kwargs.get("position_ids") is not None)
    )


def refuse(site: Site, runtime: Runtime) -> str | None:
    if not site.family.trace_loss:
        return "its row describes its head and loss"
    reason = head_reason(head_of(site.module, site.family), runtime)
    if reason is not None:
        return reason
    kind = type(site.module)
    source = inspect.getsource(inspect.unwrap(getattr(kind, MARK, kind).forward))
    return None if "self.loss_function(" in source else "its forward does not call the model's loss function"


IMPLEMENTATION = Implementation("lm_head_loss", "linear cross entropy, traced", forward, refuse)
