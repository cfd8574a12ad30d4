"""Cross entropy of a linear head, without holding its logits: one pass over the vocabulary per step."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastplug.ops.linear_cross_entropy.autograd import LinearCrossEntropy, loss
from fastplug.ops.logprobs import check_head, check_targets, chunked, linear_logprobs
from fastplug.ops.logprobs.autograd import wanted_gradients
from fastplug.ops.logprobs.chunked import Settings

__all__ = ["CrossEntropy", "linear_cross_entropy"]


class CrossEntropy(NamedTuple):
    """The loss, and what can be reported beside it.

    Attributes:
        loss: fp32, 0-dimensional, or [T] with ``reduction="none"``.
        argmax: [T] int64, the most likely token of each row, or None.
        correct: [T] bool, whether that is the target, or None; False where ignored.
        entropy: [T] fp32 in nats, or None; without a gradient.
    """

    loss: Tensor
    argmax: Tensor | None
    correct: Tensor | None
    entropy: Tensor | None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    num_items: Tensor | float | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    chunk_size: int | None = None,
    implementation: Any = None,
    counted: Tensor | None = None,
    argmax: bool = True,
) -> CrossEntropy:
    """``F.cross_entropy(z, targets)`` of ``z = softcap·tanh(logit_scale·(hidden·weightᵀ + bias) / softcap)``.

    Args:
        hidden: [T, H], weight: [V, H], targets: [T] int64, bias: [V] or None, as in
            :func:`fastplug.ops.logprobs.linear_logprobs`; the options that are not named here are the same too.
        reduction: ``"mean"`` divides the sum over the rows that are not ignored by ``num_items``, or by their number
            where that is None (NaN if there is none, as in PyTorch); ``"sum"`` and ``"none"`` as in PyTorch.
        num_items: The items of the whole accumulated batch (the Trainer's ``num_items_in_batch``): a number, or a
            tensor of one element, which stays on its device.
        counted: [R] int64 on the device of hidden, without duplicates: the only rows to compute, where the targets of
            all others are known to be ignored. Prompts and padding then cost no logits. The result has R rows.
        argmax: Whether to give the most likely tokens. To find them costs some time, which a scalar loss spares.

    The gradients of hidden, weight and bias, those that are required, come from the same pass as a scalar loss.
    With ``"none"``, a trained head computes its logits again in backward. There is no host sync. For one backward,
    a trained weight costs a buffer of [V, H] in fp32 while the pass runs and one in its own dtype until backward.

    Raises:
        ValueError: As :func:`fastplug.ops.logprobs.linear_logprobs`; an unknown ``reduction``, or ``num_items`` with
            one that does not divide; ``counted`` with ``"none"``, whose result has a row for each of hidden.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items divides the loss, which reduction={reduction!r} does not: use 'mean'")
    if counted is not None and reduction == "none":
        raise ValueError("counted leaves rows out, and reduction='none' has a result for each: give only one of them")
    if reduction == "none":
        logprob, row_entropy, found = linear_logprobs(
            hidden,
            weight,
            targets,
            bias,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            entropy=entropy,
            chunk_size=chunk_size,
            implementation=implementation,
        )
        row_entropy = None if row_entropy is None else row_entropy.detach()
        return _result(-logprob, found if argmax else None, targets, row_entropy)

    settings = Settings(logit_scale, softcap, 1.0, ignore_index, entropy, chunk_size, implementation, argmax)
    check_head(hidden, weight, bias, targets)
    check_targets(targets, weight.shape[0], ignore_index)
    targets = targets.contiguous()
    items = 1.0 if reduction == "sum" else _items(targets, num_items, ignore_index)
    targets = targets if counted is None else targets.index_select(0, counted)
    dtype = chunked.compute_dtype(hidden, weight)
    needs = wanted_gradients(hidden, weight, bias)
    if any(needs):
        scalar, best, row_entropy = LinearCrossEntropy.apply(
            hidden, weight, bias, targets, items, settings, dtype, needs, counted
        )
    else:
        rows, _ = chunked.forward(hidden, weight, bias, targets, settings, dtype, counted=counted)
        scalar, best, row_entropy = loss(rows.logprob, items), rows.argmax, rows.entropy
    return _result(scalar, best, targets, row_entropy)


def _result(loss: Tensor, argmax: Tensor | None, targets: Tensor, entropy: Tensor | None) -> CrossEntropy:
    return CrossEntropy(loss, argmax, None if argmax is None else argmax == targets, entropy)


def _items(targets: Tensor, num_items: Tensor | float | None, ignore_index: int) -> Tensor | float:
    """What the sum is divided by, where it can be used without a sync."""
    if num_items is None:
        return (targets != ignore_index).sum()
    if isinstance(num_items, torch.Tensor):
        return num_items.detach().to(targets.device, non_blocking=True).reshape(())
    return num_items
