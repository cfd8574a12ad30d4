"""What the chunk operations compute, in plain PyTorch. It is also the CPU path, so it makes few passes.

With ``a`` the raw logits of a row, ``c`` the softcap, ``s`` the logit scale and ``τ`` the temperature::

    z        = c·tanh(s·a / c) / τ                (without a softcap: s·a / τ)
    logprob  = z_t - logsumexp(z)                 p = softmax(z)
    entropy  = -Σ p_j·log p_j
    ∂logprob/∂z_j = 1[j = t] - p_j                ∂entropy/∂z_j = -p_j·(log p_j + entropy)
    ∂z/∂a    = (s/τ)·(1 - tanh²(s·a / c))

The statistics of a row are ``(max z, log Σ exp(z - max z))``: their sum is the logsumexp, and kept apart they do not
lose the digits that a large maximum would cost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 512
"""Vocabulary entries per block of the two-level argmax: torch's own argmax on a CPU is not vectorised (2.13)."""


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    logprob: Tensor,
    statistics: Tensor,
    argmax: Tensor | None,
    entropy: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    ignore_index: int,
) -> None:
    """Fill ``logprob`` [C], ``statistics`` [C, 2], ``argmax`` [C] int64 and ``entropy`` [C] from ``logits`` [C, V]; the
    last two where they are given.

    A ``softcap`` of 0 means none. Rows with the target ``ignore_index`` get log-probability 0; a target outside the
    vocabulary gives NaN. ``logits`` are left as they are.
    """
    z, _ = _transform(logits, logprob.dtype, logit_scale, softcap, temperature)
    _statistics(z, torch.softmax(z, 1), targets, logprob, statistics, argmax, entropy, ignore_index)


def token_logprobs_and_gradient(
    logits: Tensor,
    targets: Tensor,
    logprob: Tensor,
    statistics: Tensor,
    argmax: Tensor | None,
    entropy: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    ignore_index: int,
) -> None:
    """:func:`token_logprobs`, then ``logits`` are overwritten by ``-∂logprob/∂logits`` (0 for ignored rows)."""
    z, slope = _transform(logits, logprob.dtype, logit_scale, softcap, temperature)
    keeps_z = entropy is not None or (z is not logits and z.dtype == logits.dtype)
    if keeps_z:
        p = torch.softmax(z, 1)
        _statistics(z, p, targets, logprob, statistics, argmax, entropy, ignore_index)
    else:  # the softmax replaces z: what is read of z is read before
        p = _statistics(z, None, targets, logprob, statistics, argmax, None, ignore_index)
    ignored, unknown, index = _targets(targets, logits.shape[1], ignore_index)
    p.scatter_add_(1, index, torch.full_like(index, -1, dtype=p.dtype))
    _store(logits, p, slope, ignored, unknown)


def token_logprobs_backward(
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    entropy: Tensor | None,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    ignore_index: int,
) -> None:
    """Overwrite ``logits`` [C, V] with ``grad_logprob·∂logprob/∂logits + grad_entropy·∂entropy/∂logits``.

    ``statistics`` [C, 2] and ``entropy`` [C] are those that :func:`token_logprobs` found for the same logits;
    ``entropy`` is read only with ``grad_entropy``. The gradient of ignored rows' log-probability is 0.
    """
    z, slope = _transform(logits, statistics.dtype, logit_scale, softcap, temperature)
    ignored, unknown, index = _targets(targets, logits.shape[1], ignore_index)
    log_p = z.sub_(statistics[:, :1]).sub_(statistics[:, 1:])  # z may be the logits themselves: they are overwritten
    upstream = torch.zeros_like(statistics[:, :1]) if grad_logprob is None else grad_logprob.unsqueeze(1)
    upstream = upstream.masked_fill(ignored, 0)
    if grad_entropy is None:
        gradient = log_p.exp_().mul_(-upstream)
    else:
        assert entropy is not None
        p = torch.exp(log_p)
        finite = log_p.clamp_(min=torch.finfo(log_p.dtype).min)
        factor = finite.add_(entropy.unsqueeze(1)).mul_(grad_entropy.unsqueeze(1))
        gradient = p.mul_(factor.add_(upstream).neg_())
    gradient.scatter_add_(1, index, upstream)
    _store(logits, gradient, slope, ignored if grad_entropy is None else None, unknown)


def _transform(
    logits: Tensor, dtype: torch.dtype, logit_scale: float, softcap: float, temperature: float
) -> tuple[Tensor, Tensor | float]:
    """``z`` (the logits themselves where nothing changes them) and ``∂z/∂logits``."""
    slope = logit_scale / temperature
    z = logits.to(dtype)
    if softcap:
        tanh = torch.mul(z, logit_scale / softcap).tanh_()
        return tanh * (softcap / temperature), tanh.square_().neg_().add_(1).mul_(slope)
    return (z if slope == 1 else z * slope), slope


def _targets(targets: Tensor, vocabulary: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows are ignored, which have an impossible target [C, 1], and an index [C, 1] that is safe to gather."""
    column = targets.unsqueeze(1)
    ignored = column == ignore_index
    unknown = ((column < 0) | (column >= vocabulary)) & ~ignored
    return ignored, unknown, column.clamp(0, vocabulary - 1)


def _statistics(
    z: Tensor,
    p: Tensor | None,
    targets: Tensor,
    logprob: Tensor,
    statistics: Tensor,
    argmax: Tensor | None,
    entropy: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Fill the outputs and return the softmax of ``z``, which replaces ``z`` where ``p`` is None."""
    ignored, unknown, index = _targets(targets, z.shape[1], ignore_index)
    best = _argmax(z)
    largest = z.gather(1, best)
    target = z.gather(1, index) - largest
    if p is None:
        p = torch.softmax(z, 1, out=z)
    # The softmax at the maximum is 1 / Σ exp(z - max): no second pass for the logarithm of the sum.
    log_sum = p.gather(1, best).log_().neg_()
    if argmax is not None:
        argmax.copy_(best.squeeze(1))
    statistics.copy_(torch.cat((largest, log_sum), 1))
    found = (target - log_sum).masked_fill_(unknown, math.nan).masked_fill_(ignored, 0)
    logprob.copy_(found.squeeze(1))
    if entropy is not None:
        log_p = torch.sub(z, largest).clamp_(min=torch.finfo(z.dtype).min)  # 0·log 0 = 0, not NaN
        mean = log_p.mul_(p).sum(1)  # not a matrix product: BLAS sums in a row and loses a digit
        torch.sub(log_sum.squeeze(1), mean, out=entropy)
    return p


def _argmax(z: Tensor) -> Tensor:
    """First index of each row's maximum, [C, 1]: the maximum of each block, then the place inside the best block."""
    vocabulary = z.shape[1]
    whole = vocabulary // BLOCK
    if whole < 2 or not z.is_contiguous():
        return z.argmax(1, keepdim=True)
    blocks = z[:, : whole * BLOCK].unflatten(1, (whole, BLOCK))
    maxima = blocks.amax(2)
    if whole * BLOCK < vocabulary:
        maxima = torch.cat((maxima, z[:, whole * BLOCK :].amax(1, keepdim=True)), 1)
    start = maxima.argmax(1, keepdim=True) * BLOCK
    columns = (start + torch.arange(BLOCK, device=z.device)).clamp_(max=vocabulary - 1)
    return start + z.gather(1, columns).argmax(1, keepdim=True)


def _store(logits: Tensor, gradient: Tensor, slope: Tensor | float, ignored: Tensor | None, unknown: Tensor) -> None:
    if isinstance(slope, Tensor) or slope != 1:
        gradient.mul_(slope)
    if gradient is not logits:
        logits.copy_(gradient)
    if ignored is not None:
        _fill_rows(logits, ignored, 0)
    _fill_rows(logits, unknown, math.nan)


def _fill_rows(tensor: Tensor, rows: Tensor, value: float) -> None:
    """Fill the rows where ``rows`` [C, 1] is true. A CPU touches only those; elsewhere counting them would sync.

    Not where ``torch.compile`` traces: inductor (2.13) fuses an assignment by mask with the ``scatter_add_`` before it
    in the wrong order.
    """
    if tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        tensor[rows.squeeze(1)] = value
    else:
        tensor.masked_fill_(rows, value)
