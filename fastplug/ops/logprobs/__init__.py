"""Log-probability, entropy and argmax of each token, without holding the logits.

The preference and policy losses (DPO, ORPO, KTO, GRPO, ...) and cross entropy need one number per token of the
[T, V] logits, which are the largest tensor of a training step: 2 GiB for 8192 tokens of a 128k vocabulary in bf16,
and several times that with fp32 copies and gradients. Here they exist a chunk of rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastplug.ops.logprobs import chunked
from fastplug.ops.logprobs.autograd import (
    LinearLogProbs,
    LogProbs,
    LogProbsFromLogits,
    from_logits,
    wanted_gradients,
)
from fastplug.ops.logprobs.chunked import Settings

__all__ = ["LogProbs", "check_head", "check_targets", "linear_logprobs", "logprobs_from_logits"]


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    chunk_size: int | None = None,
    implementation: Any = None,
) -> LogProbs:
    """Log-probability of each target under ``softmax(z)``, with ``a = hidden·weightᵀ + bias`` and
    ``z = softcap·tanh(logit_scale·a / softcap) / temperature`` (each step only where it is set).

    Args:
        hidden: [T, H], any strides. Rows predict ``targets`` row by row: shift them before.
        weight: [V, H], the output embedding.
        targets: [T] int64 in [0, V), or ``ignore_index``.
        bias: [V] or None.
        entropy: Whether to compute the entropy of each row too.
        chunk_size: Rows of logits that exist at once; None chooses by memory (512 MiB, on a CPU 32 MiB).
        implementation: The module with the chunk operations, ``fastplug.ops.logprobs.reference`` or ``.kernel`` or
            one that offers the same functions; None chooses by device.

    Returns:
        ``logprob`` [T] fp32, 0 where ignored; ``entropy`` [T] fp32 in nats, of every row, or None; ``argmax`` [T].
        The first two take any upstream gradient; an ignored row gets none from ``logprob``. A non-finite logit
        makes its row NaN, as in PyTorch. fp64 inputs give fp64.

    The product runs in autocast's dtype where that is on, else in the dtype of ``weight``, to which each chunk of
    ``hidden`` is cast. With a frozen head (``weight`` and ``bias`` need no gradient) the forward computes
    ``∂logprob/∂hidden`` at once, so backward makes no product with the vocabulary; a gradient through ``entropy``,
    or a trained head, computes the logits again. There is no host sync.

    Raises:
        ValueError: Shapes or options do not fit, or, on a CPU only, a target lies outside the vocabulary. Elsewhere
            looking would sync: the log-probability and gradient of such a row are NaN.
    """
    settings = Settings(logit_scale, softcap, temperature, ignore_index, entropy, chunk_size, implementation)
    check_head(hidden, weight, bias, targets)
    check_targets(targets, weight.shape[0], ignore_index)
    dtype = chunked.compute_dtype(hidden, weight)
    needs = wanted_gradients(hidden, weight, bias)
    targets = targets.contiguous()
    if any(needs):
        logprob, row_entropy, argmax = LinearLogProbs.apply(hidden, weight, bias, targets, settings, dtype, needs)
        return LogProbs(logprob, row_entropy, argmax)
    rows, _ = chunked.forward(hidden, weight, bias, targets, settings, dtype)
    assert rows.argmax is not None
    return LogProbs(rows.logprob, rows.entropy, rows.argmax)


def logprobs_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    chunk_size: int | None = None,
    implementation: Any = None,
) -> LogProbs:
    """:func:`linear_logprobs` for logits that exist already: ``logits`` [..., V], ``targets`` [...] int64.

    The results have the shape of ``targets``. The logits are read once, without fp32 copies, and kept as they are;
    their gradient is the one tensor of their size that backward makes. Raises as :func:`linear_logprobs` does.
    """
    settings = Settings(logit_scale, softcap, temperature, ignore_index, entropy, chunk_size, implementation)
    if logits.shape[:-1] != targets.shape or targets.dtype != torch.int64:
        raise ValueError(
            f"logits are {tuple(logits.shape)}, targets {targets.dtype} {tuple(targets.shape)}: targets must be int64 "
            "of the logits' shape without its last dimension"
        )
    check_targets(targets, logits.shape[-1], ignore_index)
    shape, targets = targets.shape, targets.reshape(-1)
    rows = logits.reshape(-1, logits.shape[-1])
    if torch.is_grad_enabled() and logits.requires_grad:
        logprob, row_entropy, argmax = LogProbsFromLogits.apply(rows, targets, settings)
    else:
        logprob, _, argmax, row_entropy = from_logits(rows, targets, settings)
    row_entropy = None if row_entropy is None else row_entropy.view(shape)
    return LogProbs(logprob.view(shape), row_entropy, argmax.view(shape))


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    """Raise ValueError unless the tensors are [T, H], [V, H], [V] or None, and [T] int64."""
    fits = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1]
    fits = fits and targets.shape == hidden.shape[:1] and targets.dtype == torch.int64
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            "expected hidden [T, H], weight [V, H], bias [V] or None and int64 targets [T], got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {None if bias is None else tuple(bias.shape)} and "
            f"{targets.dtype} {tuple(targets.shape)}: flatten batch and sequence first"
        )


def check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """On a CPU, raise ValueError for a target outside the vocabulary. Elsewhere nothing: looking would sync."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if bool(wrong.any()):
        first = int(targets[wrong][0])
        raise ValueError(
            f"{int(wrong.sum())} targets lie outside the vocabulary of {vocabulary} (the first is {first}): use token "
            f"ids in [0, {vocabulary}), or ignore_index={ignore_index} for tokens without a loss"
        )
