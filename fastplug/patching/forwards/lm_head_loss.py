"""The head and its cross entropy, without holding the logits: the forward of a ``...ForCausalLM``.

Runs where the model is asked for a loss. The logits that come with it are lazy: see ``lazy_logits.py``.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastplug.families import Family
from fastplug.memory.oom import with_room
from fastplug.ops.linear_cross_entropy import linear_cross_entropy
from fastplug.patching import caches
from fastplug.patching.forwards.labels import Labels
from fastplug.patching.forwards.lazy_logits import LazyLogits
from fastplug.patching.forwards.step_cache import step_cache, unpadded
from fastplug.patching.inspection import global_hooks
from fastplug.patching.packed import CU_SEQLENS, warn_of_crossing
from fastplug.patching.projection import base_layer, read
from fastplug.patching.sites import Binding, Implementation, NotCovered, Runtime, Site
from fastplug.sharding import SHARDED, Anchor, call_within, gathers_itself

FEW = 128  # rows of logits at a time where there is no place for as many as usual


def forward(model: nn.Module, binding: Binding, *args: Any, **kwargs: Any) -> Any:
    kwargs = {**dict(zip(binding.parameters, args)), **kwargs}
    labels = kwargs.pop("labels", None)
    if labels is None:
        return NotCovered()  # the caller wants logits: generation, label smoothing, a loss of its own
    family, config = binding.family, model.config
    head = head_of(model, family)
    reason = not_covered(model, kwargs) or head_reason(head, binding.runtime)
    if head is None or reason is not None:
        return NotCovered(reason)
    if torch.compiler.is_compiling():
        # The lazy logits below cannot be traced. A break here, before the model is traced, spares every caller's frame
        # from tracing all of it only to find that.
        if kwargs.get("position_ids") is None and kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = unpadded(kwargs["attention_mask"])  # which is not traced: a break, too
        else:
            torch._dynamo.graph_break()
    kwargs.pop("logits_to_keep", None)
    wanted = Labels(labels, kwargs)
    stand_in = without_cache(model, kwargs, binding.runtime)
    backbone: nn.Module = getattr(model, model.base_model_prefix)  # type: ignore[call-overload]
    outputs = backbone(**_heard(backbone, kwargs))
    hidden = outputs[0]
    softcap, scale = family.logit_softcap(config), family.logit_scale(config)
    loss = fused_loss(head, binding.runtime, hidden, wanted, softcap, scale)
    output_class = sys.modules[family.module].CausalLMOutputWithPast
    cache = caches.name_in(type(backbone).forward)
    return output_class(
        loss=loss,
        logits=_lazy(head, hidden, binding.runtime, softcap, scale),
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        **{cache: None if stand_in else getattr(outputs, cache)},
    )


def _heard(backbone: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without what is the loss function's alone, where the backbone takes no other keywords than its own."""
    known = _parameters(type(backbone))  # type: ignore[arg-type]
    if known is None or known >= kwargs.keys():
        return kwargs
    if kwargs.get(CU_SEQLENS) is not None and CU_SEQLENS not in known:
        warn_of_crossing(type(backbone), backbone.config)
    return {name: value for name, value in kwargs.items() if name in known}


@functools.cache
def _parameters(backbone: type[nn.Module]) -> frozenset[str] | None:
    """The names of the parameters of its forward, or None where it takes any keyword."""
    parameters = inspect.signature(backbone.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return frozenset(parameters)


def fused_loss(
    head: nn.Module,
    runtime: Runtime,
    hidden: torch.Tensor,
    labels: Labels,
    softcap: float | None,
    scale: float,
) -> torch.Tensor:
    """The cross entropy (scalar) of the head's logits for hidden [B, S, H]."""
    counted = labels.counted(hidden.device)

    def loss_of(hidden: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        features, weight, bias = head_weight(head, hidden, runtime)
        return linear_cross_entropy(
            features.reshape(-1, features.shape[-1]),
            weight,
            labels.flat.to(features.device),
            bias,
            num_items=labels.num_items,
            ignore_index=labels.ignore_index,
            softcap=softcap,
            logit_scale=scale,
            chunk_size=rows,
            implementation=runtime.ops.logprobs,
            counted=counted,
            argmax=False,
        ).loss

    def with_what_it_takes(hidden: torch.Tensor) -> torch.Tensor:
        return with_room(runtime.memory, lambda: loss_of(hidden), lambda: loss_of(hidden, FEW))

    return _gathered(head, with_what_it_takes, hidden) if gathers_itself(head) else with_what_it_takes(hidden)


def without_cache(model: nn.Module, kwargs: dict[str, Any], runtime: Runtime) -> bool:
    """Turn off the cache of a training step, which nobody reads; whether a stand-in took its place.

    Without a mask, transformers tells packed sequences by the positions it is given, but only where there is no cache:
    such a step keeps the host's setting.
    """
    no_mask = kwargs.get("attention_mask") is None
    if kwargs.get("use_cache") is not None or not torch.is_grad_enabled() or not model.training:
        return False
    if no_mask and kwargs.get("position_ids") is not None:
        return False
    kwargs["use_cache"] = False
    backbone = getattr(model, model.base_model_prefix)  # type: ignore[call-overload]
    if not no_mask or caches.given(kwargs) is not None:
        return False
    planned = runtime.memory is not None and runtime.memory.off is None and not torch.compiler.is_compiling()
    if getattr(backbone, "gradient_checkpointing", False) and not planned:  # it takes caches away from its layers
        return False
    kwargs[caches.name_in(type(backbone).forward)] = step_cache()
    return True


def not_covered(model: nn.Module, kwargs: dict[str, Any]) -> str | None:
    """Why the loss of this call is not the one that the fused op computes."""
    keep = kwargs.get("logits_to_keep", 0)
    if isinstance(keep, torch.Tensor) or keep:
        return "logits_to_keep was given with labels"
    if kwargs.get("return_dict", getattr(model.config, "return_dict", True)) is False:
        return "return_dict=False"
    loss_function = getattr(model, "loss_function", None)
    if getattr(loss_function, "__name__", None) != "ForCausalLMLoss":
        return "the model has a loss function of its own"
    if global_hooks():
        return "hooks for all modules are registered"
    return None


def head_of(model: nn.Module, family: Family) -> nn.Module | None:
    """The output projection."""
    head: nn.Module | None = getattr(model, family.head, None)
    if head is None and hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()  # type: ignore[operator]
    return head


def head_reason(head: nn.Module | None, runtime: Runtime) -> str | None:
    """Why the head cannot be fused with its loss."""
    if head is None:
        return "it has no output projection"
    found = read(head, runtime, inside=gathers_itself(head))
    if isinstance(found, str) and not (found.endswith(SHARDED) and gathers_itself(head)):
        return f"the head {found}"
    return None


def _gathered(head: nn.Module, loss_of: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """The loss, computed within a call of the head, whose hooks gather its weights."""
    found: list[torch.Tensor] = []

    def instead(hidden: torch.Tensor) -> torch.Tensor:
        loss, zero = Anchor.apply(loss_of(hidden))
        found.append(loss)
        return zero  # type: ignore[no-any-return]

    return call_within(head, instead, hidden) + found[0]  # type: ignore[no-any-return]


def head_weight(
    head: nn.Module, hidden: torch.Tensor, runtime: Runtime
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(features, weight, bias) such that features @ weightᵀ + bias are the head's logits.

    An adapter on the head makes the features [hidden, s · dropout(hidden) Aᵀ] and the weight [W, B] wider by its rank.

    Raises:
        RuntimeError: If it cannot be read, though it could before the layers ran.
    """
    projection = read(head, runtime, inside=gathers_itself(head))
    if isinstance(projection, str):
        raise RuntimeError(
            f"fastplug: the head {projection}, which was not to be seen before; disable='lm_head_loss' leaves it"
        )
    if projection.trained is not None:
        weight: torch.Tensor = projection.trained
    else:
        encoded = projection.read()
        dense = encoded.dense(encoded.tensors[0].dtype)
        if dense is None:
            dense = hidden.new_empty(encoded.shape)
            encoded.decode(dense, runtime.ops)
        weight = dense
    if projection.a is None or projection.b is None:
        return hidden, weight, projection.bias
    autocast = torch.is_autocast_enabled(hidden.device.type)
    dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else weight.dtype
    dropped = F.dropout(hidden, projection.dropout).to(dtype)
    update = F.linear(dropped, projection.a.to(dtype)) * projection.scaling
    return (
        torch.cat((hidden.to(dtype), update), dim=-1),
        torch.cat((weight.to(dtype), projection.b.to(dtype)), dim=-1),
        projection.bias,
    )


def _lazy(head: nn.Module, hidden: torch.Tensor, runtime: Runtime, softcap: float | None, scale: float) -> LazyLogits:
    autocast = torch.is_autocast_enabled(hidden.device.type)
    grad = torch.is_grad_enabled()
    autocast_dtype = torch.get_autocast_dtype(hidden.device.type)

    def compute() -> torch.Tensor:
        with torch.set_grad_enabled(grad), torch.autocast(hidden.device.type, autocast_dtype, enabled=autocast):
            there = gathers_itself(head) and not isinstance(read(head, runtime, inside=True), str)
            weight: torch.Tensor = base_layer(head).weight  # type: ignore[assignment]
            read_in = hidden.to(weight.dtype) if there and not autocast else hidden  # as its hooks do
            logits = head.forward(read_in) if there else head(hidden)
            logits = logits if scale == 1.0 else logits * scale
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return logits

    dtype = autocast_dtype if autocast else hidden.dtype
    width = base_layer(head).out_features
    return LazyLogits(compute, torch.Size((*hidden.shape[:-1], width)), dtype, hidden.device)  # type: ignore[arg-type]


def refuse(site: Site, runtime: Runtime) -> str | None:
    if site.family.trace_loss:
        from fastplug.patching.forwards import traced_loss

        return traced_loss.refuse(site, runtime) or "its row asks for the model's own forward"
    head = head_of(site.module, site.family)
    if head is None:
        return f"it has no {site.family.head}"
    projection = read(head, runtime, inside=gathers_itself(head))
    if isinstance(projection, str):
        return f"{site.family.head} {projection}"
    prefix = getattr(site.module, "base_model_prefix", None)
    if not prefix or not hasattr(site.module, prefix):
        return "it has no base model"
    return None


IMPLEMENTATION = Implementation("lm_head_loss", "linear cross entropy", forward, refuse)
