"""Saved tensors and backward of the log-probability ops.

With a frozen head, ``v = ∂(-logprob)/∂hidden`` [T, H] is all that a gradient of the log-probabilities needs, and the
forward has the logits at hand to compute it: backward is then one multiplication. In every other case (a trained
head, a gradient through the entropy) the upstream gradients decide, so backward computes the logits again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastplug.ops.logprobs import chunked, reference
from fastplug.ops.logprobs.chunked import Needs, Rows, Settings


class LogProbs(NamedTuple):
    """Of each row: ``logprob`` [T] fp32, ``argmax`` [T] int64, and ``entropy`` [T] fp32 in nats where asked for."""

    logprob: Tensor
    entropy: Tensor | None
    argmax: Tensor


def wanted_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Needs:
    """Which gradients this call has to be able to give."""
    if not torch.is_grad_enabled():
        return False, False, False
    return hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad


def scale_rows(v: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``v·factor`` in ``dtype``, multiplied in fp32: ``factor`` [T, 1] or [1, 1] is not rounded to 16 bits first."""
    return torch.mul(v, factor, out=torch.empty_like(v, dtype=dtype))


class LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        settings: Settings,
        dtype: torch.dtype,
        needs: Needs,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        frozen = not (needs[1] or needs[2])
        rows, (v, _, _) = chunked.forward(
            hidden, weight, bias, targets, settings, dtype, (True, False, False) if frozen else (False, False, False)
        )
        again = not frozen or settings.entropy
        ctx.save_for_backward(
            v, *((hidden, weight, bias, targets, rows.statistics, rows.entropy) if again else (None,) * 6)
        )
        ctx.settings, ctx.dtype, ctx.needs, ctx.hidden_dtype = settings, dtype, needs, hidden.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        assert rows.argmax is not None
        ctx.mark_non_differentiable(rows.argmax)
        ctx.set_materialize_grads(False)
        return rows.logprob, rows.entropy, rows.argmax

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, _: Any) -> tuple[Any, ...]:
        v, hidden, weight, bias, targets, statistics, entropy = ctx.saved_tensors
        if grad_logprob is None and grad_entropy is None:
            return (None,) * 7
        if v is not None and grad_entropy is None:
            assert grad_logprob is not None
            return scale_rows(v, -grad_logprob.unsqueeze(1), ctx.hidden_dtype), *(None,) * 6
        found = chunked.backward(
            hidden,
            weight,
            bias,
            targets,
            statistics,
            entropy,
            None if grad_logprob is None else grad_logprob.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(),
            ctx.settings,
            ctx.dtype,
            ctx.needs,
        )
        dtypes = (ctx.hidden_dtype, None, ctx.bias_dtype)
        return *(g if g is None or d is None else g.to(d) for g, d in zip(found, dtypes, strict=True)), *(None,) * 4


class LogProbsFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, settings: Settings) -> tuple[Tensor, Tensor | None, Tensor]:
        rows = from_logits(logits, targets, settings)
        ctx.save_for_backward(logits, targets, rows.statistics, rows.entropy)
        ctx.settings = settings
        assert rows.argmax is not None
        ctx.mark_non_differentiable(rows.argmax)
        ctx.set_materialize_grads(False)
        return rows.logprob, rows.entropy, rows.argmax

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, _: Any) -> tuple[Any, ...]:
        if grad_logprob is None and grad_entropy is None:
            return None, None, None
        logits, targets, statistics, entropy = ctx.saved_tensors
        settings: Settings = ctx.settings
        ops = settings.ops(logits.device, logits.dtype)
        gradient = logits.clone(memory_format=torch.contiguous_format)
        upstream = [None if grad is None else grad.contiguous() for grad in (grad_logprob, grad_entropy)]
        for rows in row_chunks(logits, settings):
            row = (None if tensor is None else tensor[rows] for tensor in (entropy, *upstream))
            ops.token_logprobs_backward(gradient[rows], targets[rows], statistics[rows], *row, *settings.arguments)
        return gradient, None, None


def from_logits(logits: Tensor, targets: Tensor, settings: Settings) -> Rows:
    """The results of the rows of ``logits`` [T, V] as they are."""
    ops = settings.ops(logits.device, logits.dtype)
    found = Rows.empty(logits.shape[0], logits, settings)
    with torch.no_grad():
        for rows in row_chunks(logits, settings):
            row = found.part(rows)
            part = logits[rows]
            part = part if part.stride(1) == 1 else part.contiguous()
            ops.token_logprobs(
                part, targets[rows], row.logprob, row.statistics, row.argmax, row.entropy, *settings.arguments
            )
    return found


def row_chunks(logits: Tensor, settings: Settings) -> list[slice]:
    """A kernel takes all rows at once; the reference makes fp32 copies, so it goes by chunks on every device."""
    ops = settings.ops(logits.device, logits.dtype)
    if settings.chunk_size is None and ops is not reference:
        return [slice(0, logits.shape[0])]
    return chunked.chunks(logits.shape[0], logits.shape[1], logits.dtype, logits.device, settings.chunk_size)
