"""The measure of one comparison.

Errors are L2 norms over the truth's: unlike a largest difference they hardly depend on luck. A residual stream passes
through a layer unchanged and would drown what the layer adds, so ``base`` (the stream) is subtracted first. Beside the
size of the error its direction counts: rounding errors of many elements average out along the truth, a wrong factor
does not, so that a gradient that is 1 percent off is found in bf16 too, where rounding alone makes errors of that size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fastplug.verifying.result import Kind, Row

DIRECT = 1e-5  # relative difference between two fp32 computations, times the tolerance
# Relative errors of what goes through FP8 products, times the tolerance. One rounding to e4m3 errs by 2.6% (root mean
# square of values spread evenly over a binade), a product of two such matrices by 3.6%, two products in a row by 5.1%.
# Gradients in a layer whose forward is in FP8 too have about four behind them, and attention's slope between.
FP8: dict[str, dict[Kind, float]] = {
    "fp8_backward": {"gradient": 0.06},
    "fp8": {"loss": 0.06, "output": 0.06, "gradient": 0.12},
}
WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Measure:
    """How much error passes: ``tolerance`` times the original's, plus what rounding in ``dtype`` can make.

    Of the kinds in ``fp8``, ``tolerance`` times the error that FP8 products are expected to make.
    """

    tolerance: float
    dtype: torch.dtype
    fp8: Mapping[Kind, float] = field(default_factory=dict)

    @property
    def unit(self) -> float:
        """The largest relative error of one rounding."""
        return torch.finfo(self.dtype).eps / 2

    def direct(
        self,
        name: str,
        kind: Kind,
        ours: torch.Tensor | None,
        original: torch.Tensor | None,
        base: torch.Tensor | None = None,
        limit: float | None = None,
    ) -> Row | None:
        """fastplug against the original itself; None where neither has a value."""
        if ours is None or original is None:
            return _missing(name, kind, ours, original)
        ours, original, base = _wide(ours), _wide(original), None if base is None else _wide(base)
        size = _norm(original if base is None else original - base)
        stream = 4 * self.unit * _norm(original)
        error = _norm(ours - original)
        limit = self.tolerance * max(DIRECT if limit is None else limit, self.fp8.get(kind, 0.0))
        allowed = limit + (stream / size if size else 0.0)
        return _row(name, kind, error / size if size else error, None, allowed, original)

    def judged(
        self,
        name: str,
        kind: Kind,
        ours: torch.Tensor | None,
        original: torch.Tensor | None,
        truth: torch.Tensor | None,
        base: torch.Tensor | None = None,
    ) -> Row | None:
        """fastplug's error to the truth against the original's; None where neither has a value."""
        if ours is None or original is None or truth is None:
            return _missing(name, kind, ours, original)
        ours, original, truth = (_wide(tensor).to(truth.dtype) for tensor in (ours, original, truth))
        update = truth if base is None else truth - _wide(base)
        size = _norm(update)
        if not size:  # the truth is zero: absolute errors
            size = 1.0
        mine, theirs = _norm(ours - truth) / size, _norm(original - truth) / size
        # A scalar's error can be zero by luck; a long vector's cannot, and gets little beside the factor.
        slack = self.unit * max(0.25, 1 / math.sqrt(truth.numel())) * _norm(truth) / size
        limit = self.tolerance * theirs + slack
        expected = self.tolerance * self.fp8.get(kind, 0.0)
        if limit < expected:
            return _row(name, kind, mine, theirs, expected, original)
        row = _row(name, kind, mine, theirs, limit, original)
        if row.ok and truth.numel() > 1:
            noise = 4 * theirs / math.sqrt(truth.numel())
            bias, own = _along(ours - truth, update), _along(original - truth, update)
            if abs(bias) > self.tolerance * abs(own) + self.unit + noise:
                reason = f"it is {1 + bias:.4f} times the truth, which rounding does not explain"
                return Row(name, kind, mine, theirs, limit, False, reason)
        return row


def _row(name: str, kind: Kind, error: float, theirs: float | None, limit: float, original: torch.Tensor) -> Row:
    if not bool(torch.isfinite(original).all()):
        return Row(name, kind, error, theirs, limit, False, "the original is not finite, so nothing can be compared")
    error = error if math.isfinite(error) else math.inf
    return Row(name, kind, error, theirs, limit, error <= limit, "" if math.isfinite(error) else "it is not finite")


def _missing(name: str, kind: Kind, ours: torch.Tensor | None, original: torch.Tensor | None) -> Row | None:
    if ours is None and original is None:
        return None
    if ours is not None and original is not None:
        return Row(name, kind, math.inf, None, 0.0, False, "the judge has none")
    return Row(name, kind, math.inf, None, 0.0, False, f"{'fastplug' if ours is None else 'the original'} has none")


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor if tensor.dtype in WIDE else tensor.float()


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=_accumulator(tensor)))


def _along(difference: torch.Tensor, direction: torch.Tensor) -> float:
    """The component of a difference along a direction, in units of that direction's length."""
    dtype = _accumulator(direction)
    square = float((direction * direction).sum(dtype=dtype))
    return float((difference * direction).sum(dtype=dtype)) / square if square else 0.0


def _accumulator(tensor: torch.Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
