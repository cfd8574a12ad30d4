"""Triton kernels of the chunk operations: one program per row, the same functions as in ``reference``.

The first loop over a row keeps an online softmax (Milakov and Gimelshein, arXiv:1805.02867). Each group of eight
neighbouring columns has a maximum and sums of its own, which stay in one thread: no warp waits for another before the
row's end, where the groups are put together. The entropy comes from the same loop, as ``log s - u / s`` with
``s = Σ e^(z - m)`` and ``u = Σ e^(z - m)·(z - m)``. The second loop, where a gradient is wanted, overwrites the logits.

Both are compiled without contraction of multiply and add: were ``z = pre·x`` rounded for the sum and not for the
gradient, the probabilities of a row would add up to one only within the rounding of its largest logit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastplug.ops.ahead import launched
from fastplug.ops.configs import config
from fastplug.ops.launch import on_device
from fastplug.ops.library import custom_op

LANE = 8  # columns of a group: one 16-byte access to 16-bit logits


@triton.jit
def _exp(x):
    """exp to fp32 accuracy: the hardware's 2^y after what x·log2(e) lost in rounding has been added back."""
    y = x * 1.4426950408889634
    lost = tl.math.fma(x, 1.4426950408889634, -y) + x * 1.925963033500e-8
    return tl.exp2(y) * (1 + 0.6931471805599453 * lost)


@triton.jit
def _tanh(x):
    """tanh to fp32 accuracy: an odd series near 0, where ``1 - 2/(1 + e^2|x|)`` would cancel.

    The coefficients are those of Cephes' tanhf (Moshier 1992); libdevice is not portable.
    """
    z = x * x
    series = -5.70498872745e-3 * z + 2.06390887954e-2
    series = (series * z - 5.37397155531e-2) * z + 1.33314422036e-1
    series = (series * z - 3.33332819422e-1) * z * x + x
    size = tl.minimum(tl.abs(x), 20.0)  # saturated long before
    far = 1 - tl.math.div_rn(2.0 + tl.zeros_like(x), _exp(2 * size) + 1)
    return tl.where(z < 0.390625, series, tl.where(x < 0, -far, tl.where(x == x, far, x)))


@triton.jit
def _transform(x, pre, post, SOFTCAP: tl.constexpr):
    """``z`` and ``∂z/∂x``: without a softcap ``z = pre·x``, with one ``z = post·tanh(pre·x)``."""
    if SOFTCAP:
        t = _tanh(x * pre)
        z = t * post
        slope = pre * post * (1 - t * t)
    else:
        z = x * pre
        slope = tl.zeros_like(x) + pre
    return z, slope


@triton.jit
def _shifted(m, new_m):
    """What sums over exp(z - m) are shifted and multiplied by when the maximum becomes ``new_m``; -inf: no sum yet."""
    shift = tl.where(new_m == -float("inf"), 0.0, new_m)
    delta = tl.where(m == -float("inf"), 0.0, m - shift)
    rescale = tl.where(m == -float("inf"), 0.0, tl.exp(delta))
    return shift, delta, rescale


@triton.jit
def _logprobs_kernel(
    logits,  # [C, V], rows `stride` apart; overwritten where GRADIENT
    targets,  # [C] int64
    logprob,  # [C] fp32
    statistics,  # [C, 2] fp32: max z, log Σ exp(z - max z)
    argmax,  # [C] int64, or None
    entropy,  # [C] fp32, where ENTROPY
    stride,
    V,
    pre,
    post,
    ignore_index,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows · V passes 2^31
    logits += row * stride
    target = tl.load(targets + row)
    ignored = target == ignore_index
    known = (target >= 0) & (target < V)
    # Read before the second loop writes: the reductions of the first loop stand between.
    raw = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
    group = tl.arange(0, BLOCK // LANE)
    columns = group[:, None] * LANE + tl.arange(0, LANE)[None, :]

    m = tl.full((BLOCK // LANE,), -float("inf"), tl.float32)
    best = tl.zeros((BLOCK // LANE,), tl.int32)
    s = tl.zeros((BLOCK // LANE,), tl.float32)
    u = tl.zeros((BLOCK // LANE,), tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        x = tl.load(logits + start + columns, mask=inside, other=0.0).to(tl.float32)
        z, _ = _transform(x, pre, post, SOFTCAP)
        z = tl.where(inside, z, -float("inf"))
        if argmax is not None:
            largest, place = tl.max(z, axis=1, return_indices=True)
            best = tl.where(largest > m, start + group * LANE + place, best)
        else:
            largest = tl.max(z, axis=1)
        new_m = tl.maximum(m, largest)
        shift, delta, rescale = _shifted(m, new_m)
        e = tl.exp(z - shift[:, None])
        if ENTROPY:
            u = rescale * (u + s * delta) + tl.sum(tl.where(e > 0, e * (z - shift[:, None]), 0.0), axis=1)
        s = s * rescale + tl.sum(e, axis=1)
        m = new_m

    lanes_m = m
    m = tl.max(lanes_m, axis=0)
    _, delta, rescale = _shifted(lanes_m, m)
    u = rescale * (u + s * delta)
    s = s * rescale
    total = tl.sum(s, axis=0)
    log_sum = tl.log(total)
    z_target, _ = _transform(raw, pre, post, SOFTCAP)
    tl.store(logprob + row, tl.where(ignored, 0.0, (z_target - m) - log_sum))
    tl.store(statistics + 2 * row, m)
    tl.store(statistics + 2 * row + 1, log_sum)
    if argmax is not None:
        first = tl.min(tl.where(lanes_m == m, best, V), axis=0)  # of equal logits the first
        tl.store(argmax + row, first.to(tl.int64))
    if ENTROPY:
        tl.store(entropy + row, log_sum - tl.sum(u, axis=0) / total)

    if GRADIENT:
        if ignored:
            for start in range(0, V, BLOCK):
                zero = tl.zeros((BLOCK // LANE, LANE), logits.dtype.element_ty)
                tl.store(logits + start + columns, zero, mask=start + columns < V)
        else:
            spoil = tl.where(known, 0.0, float("nan"))  # an impossible target: NaN, never a wrong number
            for start in range(0, V, BLOCK):
                inside = start + columns < V
                x = tl.load(logits + start + columns, mask=inside, other=0.0).to(tl.float32)
                z, slope = _transform(x, pre, post, SOFTCAP)
                p = tl.exp(z - m - log_sum)
                g = (p - tl.where(start + columns == target, 1.0, 0.0)) * slope + spoil
                tl.store(logits + start + columns, g.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    logits,  # [C, V], rows `stride` apart; overwritten
    targets,  # [C] int64
    statistics,  # [C, 2] fp32
    entropy,  # [C] fp32, where GRAD_ENTROPY
    grad_logprob,  # [C] fp32, where GRAD_LOGPROB
    grad_entropy,  # [C] fp32, where GRAD_ENTROPY
    stride,
    V,
    pre,
    post,
    ignore_index,
    SOFTCAP: tl.constexpr,
    GRAD_LOGPROB: tl.constexpr,
    GRAD_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    ignored = target == ignore_index
    columns = tl.arange(0, BLOCK)
    upstream = 0.0
    if GRAD_LOGPROB:
        upstream = tl.load(grad_logprob + row)
    known = (target >= 0) & (target < V)
    upstream = tl.where(ignored, 0.0, tl.where(known, upstream, float("nan")))
    if ignored & (not GRAD_ENTROPY):
        for start in range(0, V, BLOCK):
            zero = tl.zeros((BLOCK,), logits.dtype.element_ty)
            tl.store(logits + start + columns, zero, mask=start + columns < V)
    else:
        m = tl.load(statistics + 2 * row)
        log_sum = tl.load(statistics + 2 * row + 1)
        if GRAD_ENTROPY:
            h = tl.load(entropy + row)
            upstream_entropy = tl.load(grad_entropy + row)
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            x = tl.load(logits + start + columns, mask=inside, other=0.0).to(tl.float32)
            z, slope = _transform(x, pre, post, SOFTCAP)
            log_p = z - m - log_sum
            p = tl.exp(log_p)
            g = upstream * (tl.where(start + columns == target, 1.0, 0.0) - p)
            if GRAD_ENTROPY:
                g -= tl.where(p == 0, 0.0, upstream_entropy * p * (log_p + h))
            tl.store(logits + start + columns, (g * slope).to(logits.dtype.element_ty), mask=inside)


def _factors(logit_scale: float, softcap: float, temperature: float) -> tuple[float, float]:
    if softcap:
        return logit_scale / softcap, softcap / temperature
    return logit_scale / temperature, 1.0


def _launch_shape(vocabulary: int, device: torch.device, softcap: float) -> tuple[int, int]:
    """``(columns of a block, warps)``; half as many warps with a softcap, whose arithmetic needs 64 registers more."""
    warps, per_warp = config(device).logits_warps // (2 if softcap else 1), config(device).per_warp(2)
    block = min(triton.next_power_of_2(vocabulary), warps * per_warp)
    return block, max(1, block // per_warp)


def _launch_logprobs(
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
    gradient: bool,
) -> None:
    if logits.shape[0] == 0:
        return
    assert logits.stride(1) == 1
    pre, post = _factors(logit_scale, softcap, temperature)
    block, warps = _launch_shape(logits.shape[1], logits.device, softcap)
    with on_device(logits):
        launched(_logprobs_kernel, (logits.shape[0],))(
            logits,
            targets,
            logprob,
            statistics,
            argmax,
            logprob if entropy is None else entropy,
            logits.stride(0),
            logits.shape[1],
            pre,
            post,
            ignore_index,
            SOFTCAP=softcap != 0,
            ENTROPY=entropy is not None,
            GRADIENT=gradient,
            BLOCK=block,
            LANE=min(LANE, block),
            num_warps=warps,
            enable_fp_fusion=False,
        )


@custom_op("logprob", "statistics", "argmax", "entropy")
def token_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    logprob: torch.Tensor,
    statistics: torch.Tensor,
    argmax: torch.Tensor | None,
    entropy: torch.Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    ignore_index: int,
) -> None:
    """Launch :func:`fastplug.ops.logprobs.reference.token_logprobs`; ``logits`` rows need stride 1 within."""
    _launch_logprobs(
        logits,
        targets,
        logprob,
        statistics,
        argmax,
        entropy,
        logit_scale,
        softcap,
        temperature,
        ignore_index,
        False,
    )


@custom_op("logits", "logprob", "statistics", "argmax", "entropy")
def token_logprobs_and_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    logprob: torch.Tensor,
    statistics: torch.Tensor,
    argmax: torch.Tensor | None,
    entropy: torch.Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    ignore_index: int,
) -> None:
    """Launch :func:`fastplug.ops.logprobs.reference.token_logprobs_and_gradient`."""
    _launch_logprobs(
        logits,
        targets,
        logprob,
        statistics,
        argmax,
        entropy,
        logit_scale,
        softcap,
        temperature,
        ignore_index,
        True,
    )


@custom_op("logits")
def token_logprobs_backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    statistics: torch.Tensor,
    entropy: torch.Tensor | None,
    grad_logprob: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    ignore_index: int,
) -> None:
    """Launch :func:`fastplug.ops.logprobs.reference.token_logprobs_backward`."""
    if logits.shape[0] == 0:
        return
    assert logits.stride(1) == 1
    pre, post = _factors(logit_scale, softcap, temperature)
    block, warps = _launch_shape(logits.shape[1], logits.device, softcap)
    with on_device(logits):
        launched(_backward_kernel, (logits.shape[0],))(
            logits,
            targets,
            statistics,
            statistics if entropy is None else entropy,
            statistics if grad_logprob is None else grad_logprob,
            statistics if grad_entropy is None else grad_entropy,
            logits.stride(0),
            logits.shape[1],
            pre,
            post,
            ignore_index,
            SOFTCAP=softcap != 0,
            GRAD_LOGPROB=grad_logprob is not None,
            GRAD_ENTROPY=grad_entropy is not None,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=False,
        )
