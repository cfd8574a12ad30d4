"""The head that TRL puts on a model, computed by the fused op.

TRL 1.15 and later set ``model.forward`` to a forward of their own, which with ``fused_lm_head=True`` gives what its
trainers read of each token that has a label: log-probability, entropy, mean logit, whether it is the likeliest. It
waits for all layers before it picks these tokens' rows, and computes their logits once more in its backward. Ours knows
the rows before, and has the gradient already. Nothing of TRL is imported: its settings are read off its forward, and
one that is not as known here keeps running.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import nn

from fastplug.memory.oom import with_room
from fastplug.ops.logprobs import linear_logprobs
from fastplug.patching.forwards import lm_head_loss
from fastplug.patching.forwards.labels import Labels
from fastplug.patching.forwards.lm_head_loss import FEW, head_reason, head_weight
from fastplug.patching.inspection import runs_ours
from fastplug.patching.projection import read
from fastplug.patching.sites import Binding, Implementation, NotCovered, Runtime, Site
from fastplug.sharding import gathers_itself

PARAMETERS = ("self", "args", "fused_lm_head", "labels", "shift_labels", "num_items_in_batch", "kwargs")
SETTINGS = (
    "backbone_attr",
    "cast_lm_head_to_fp32",
    "final_logit_softcapping",
    "logit_scale",
    "original_forward",
    "outputs",
    "temperature",
    "text_config",
)
FIELDS = ("loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask", "aux_loss")
SERVED = {"log_probs", "entropy", "mean_logits", "is_top1"}


def is_known(forward: object) -> bool:
    """Whether it is TRL's, of a version that is as described here."""
    function: Any = getattr(forward, "__func__", None)
    code = getattr(function, "__code__", None)
    if code is None or (code.co_name, function.__globals__.get("__name__")) != ("_fused_forward", "trl.trainer.utils"):
        return False
    output = function.__globals__.get("FusedCausalLMOutput")
    parameters = tuple(inspect.signature(function, follow_wrapped=False).parameters)
    fields = tuple(field.name for field in dataclasses.fields(output)) if dataclasses.is_dataclass(output) else ()
    return (parameters, code.co_freevars, fields) == (PARAMETERS, SETTINGS, FIELDS)


def settings_of(forward: Any) -> dict[str, Any]:
    """What a known forward was made with, by the names of its free variables."""
    return dict(zip(SETTINGS, (cell.cell_contents for cell in forward.__func__.__closure__)))


def forward(model: nn.Module, binding: Binding, *args: Any, **kwargs: Any) -> Any:
    if not kwargs.pop("fused_lm_head", False):
        return lm_head_loss.forward(model, binding, *args, **kwargs)
    if torch.compiler.is_compiling():
        return NotCovered()
    settings = settings_of(binding.stands_in_for)
    projection: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    reason = _not_covered(settings, projection, binding.runtime, kwargs)
    if reason is not None:
        return NotCovered(reason)
    labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    items = kwargs.pop("num_items_in_batch", None)
    wanted = Labels(labels, {"shift_labels": shifted})
    kwargs = {**dict(zip(binding.parameters, args)), **kwargs, "use_cache": None}
    lm_head_loss.without_cache(model, kwargs, binding.runtime)
    hidden = getattr(model, settings["backbone_attr"])(**{**kwargs, "use_cache": False}).last_hidden_state
    found = _scores(settings, projection, binding.runtime, hidden, wanted)
    # The last token of a row predicts none: it has no place in what TRL returns.
    length = hidden.shape[1] - (shifted is None)
    each = {name: value.view(hidden.shape[:2])[:, :length] for name, value in found.items()}
    items = each["label_mask"].sum().clamp(min=1) if items is None else items
    output = binding.stands_in_for.__func__.__globals__["FusedCausalLMOutput"]
    return output(loss=-each["log_probs"].sum() / items, **each)


def _not_covered(
    settings: dict[str, Any], projection: nn.Module, runtime: Runtime, kwargs: dict[str, Any]
) -> str | None:
    """Why a call is left to TRL's own forward."""
    more = set(settings["outputs"]) - SERVED
    if more:
        return f"TRL wants {', '.join(sorted(more))} of its head"
    if "mean_logits" in settings["outputs"] and settings["final_logit_softcapping"] is not None:
        return "TRL wants the mean of logits with a softcap of its head"
    if settings["cast_lm_head_to_fp32"]:
        return "TRL's head is to be computed in fp32"
    if kwargs.get("output_router_logits") or getattr(settings["text_config"], "output_router_logits", False):
        return "TRL's head adds a router's loss"
    if kwargs.get("labels") is None and kwargs.get("shift_labels") is None:
        return "TRL's head was called without labels"
    if gathers_itself(projection):
        return "the head is sharded"
    found = read(projection, runtime)
    if isinstance(found, str):
        return f"the head {found}"
    return "the head has an adapter" if found.a is not None else None


def _scores(
    settings: dict[str, Any], projection: nn.Module, runtime: Runtime, hidden: torch.Tensor, labels: Labels
) -> dict[str, torch.Tensor]:
    """What TRL returns of each token, [B·S], zero where there is no label, and which have one."""
    counted = labels.counted(hidden.device)
    features, weight, bias = head_weight(projection, hidden, runtime)
    rows, answers = features.reshape(-1, features.shape[-1]), labels.flat.to(features.device)
    mask = labels.mask.to(features.device)
    if counted is not None:
        rows, answers = rows.index_select(0, counted), answers.index_select(0, counted)

    def score(chunk: int | None = None) -> Any:
        return linear_logprobs(
            rows,
            weight,
            answers,
            bias,
            temperature=settings["temperature"],
            softcap=settings["final_logit_softcapping"],
            logit_scale=settings["logit_scale"],
            ignore_index=labels.ignore_index,
            entropy="entropy" in settings["outputs"],
            chunk_size=chunk,
            implementation=runtime.ops.logprobs,
        )

    found = with_room(runtime.memory, score, lambda: score(FEW))

    def everywhere(values: torch.Tensor) -> torch.Tensor:
        if counted is None:
            return values.masked_fill(~mask, 0)
        return values.new_zeros(mask.shape).index_copy(0, counted, values)

    values = {"log_probs": found.logprob, "entropy": found.entropy}
    if "mean_logits" in settings["outputs"]:
        values["mean_logits"] = _mean_logits(rows, weight, bias, settings)
    if "is_top1" in settings["outputs"]:
        values["is_top1"] = found.argmax == answers
    return {"label_mask": mask, **{name: everywhere(each) for name, each in values.items() if each is not None}}


@torch.no_grad()
def _mean_logits(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, settings: dict[str, Any]
) -> torch.Tensor:
    """[R] fp32, the mean over the vocabulary: without a softcap, the product with the mean row of the weight."""
    average = weight.mean(0, dtype=torch.float32)
    mean = torch.cat([part.float() @ average for part in rows.split(2048)])
    mean = mean if bias is None else mean + bias.float().mean()
    return mean * (settings["logit_scale"] / settings["temperature"])


def refuse(site: Site, runtime: Runtime) -> str | None:
    head: nn.Module = site.module.get_output_embeddings()  # type: ignore[operator]
    return head_reason(head, runtime)


def stands_in(module: nn.Module) -> bool:
    """Whether TRL's head is on it, and around no other forward than its class's or ours."""
    own = module.__dict__.get("forward")
    if not is_known(own):
        return False
    inner = getattr(settings_of(own)["original_forward"], "__func__", None)
    return inner is not None and (inner is type(module).forward or runs_ours(inner))


IMPLEMENTATION = Implementation(
    "lm_head_loss", "log-probabilities in TRL's head", forward, refuse, priority=1, stands_in=stands_in
)
