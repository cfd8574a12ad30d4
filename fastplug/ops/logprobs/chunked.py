"""The loop over row chunks that stands in for the [T, V] logits.

One buffer of [C, V] is filled by a matrix product, read once by the op, overwritten by the gradient with respect to
the logits, and multiplied into the gradients that are wanted, chunk after chunk. Chunks come in order and nothing is
summed by atomics: the same inputs give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastplug.devices import kernel_reason
from fastplug.ops.add_product import add_product

GPU_BYTES = 512 * 2**20
"""Size of the logits buffer on an accelerator: 2048 rows of a 128k vocabulary in bf16 fill the matrix units."""
SHORT = 512
"""Rows that still fill the matrix units: of a frozen head the logits of a short batch are computed in two halves of at
least so many, of which one is in memory."""
CPU_BYTES = 32 * 2**20
"""The same on a CPU: 16 MiB read the weight too often, 64 left the cache (EPYC, 1 and 2 threads, V=49k and 128k)."""
WEIGHT_ROWS = 16384
"""Rows of the weight gradient that are added at a time where the product cannot be accumulated in fp32."""

Needs = tuple[bool, bool, bool]
"""Whether the gradients of hidden, weight and bias are wanted."""


@dataclass(frozen=True)
class Settings:
    """How logits become probabilities, and how the loop is cut. ``chunk_size`` None: by the size of the buffer."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100
    entropy: bool = False
    chunk_size: int | None = None
    implementation: Any = None
    argmax: bool = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}: for greedy scores read the argmax")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive, got {self.softcap}: pass None for a head without one")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}: pass None to choose it by memory")

    @property
    def arguments(self) -> tuple[float, float, float, int]:
        """The last arguments of every chunk operation."""
        return float(self.logit_scale), float(self.softcap or 0.0), float(self.temperature), self.ignore_index

    def ops(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The module with the chunk operations: the one given, else Triton on an accelerator, else the reference."""
        if self.implementation is not None:
            return self.implementation
        return default_implementation(device, dtype)


class Rows(NamedTuple):
    """What the operations return of each row: fp32 (fp64 for fp64 inputs) but ``argmax`` [T] int64. What was not asked
    for is None."""

    logprob: Tensor
    statistics: Tensor
    argmax: Tensor | None
    entropy: Tensor | None

    @classmethod
    def empty(cls, rows: int, like: Tensor, settings: Settings) -> Rows:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return cls(
            like.new_empty(rows, dtype=dtype),
            like.new_empty(rows, 2, dtype=dtype),
            like.new_empty(rows, dtype=torch.int64) if settings.argmax else None,
            like.new_empty(rows, dtype=dtype) if settings.entropy else None,
        )

    def part(self, rows: slice) -> Rows:
        asked = (None if tensor is None else tensor[rows] for tensor in (self.argmax, self.entropy))
        return Rows(self.logprob[rows], self.statistics[rows], *asked)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernels(device: torch.device) -> bool:
    return kernel_reason(device) is None and device.type != "cpu"  # the interpreter runs only where it is named


def default_implementation(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The Triton module where it can run; the reference on a CPU, in fp64, and where Triton is missing."""
    if not _has_kernels(device) or dtype == torch.float64:
        from fastplug.ops.logprobs import reference

        return reference
    from fastplug.ops.logprobs import kernel  # only here: Triton may be missing

    return kernel


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype of the matrix products: that of autocast where it is on, else the weight's.

    So the weight is cast (once per pass, as autocast does) only under autocast; else each chunk of ``hidden`` is
    cast to it, as ``head(hidden.to(head.weight.dtype))`` would.
    """
    kind = hidden.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def chunks(
    rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device, size: int | None, halves: bool = False
) -> list[slice]:
    """Slices of equal length that cover ``rows``; the last may be shorter. ``halves``: see :data:`SHORT`."""
    if size is None:
        budget, multiple = (CPU_BYTES, 8) if device.type == "cpu" else (GPU_BYTES, 128)
        fit = max(1, budget // (vocabulary * dtype.itemsize))
        count = -(-rows // fit) or 1
        if halves and device.type != "cpu" and rows >= 2 * SHORT:
            count = max(count, 2)
        size = -(-rows // count)
        if fit >= multiple:
            size = min(-(-size // multiple) * multiple, fit // multiple * multiple)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, max(1, size))]


class _Head:
    """The projection in its compute dtype, with the one buffer that its logits live in.

    Where only the rows ``counted`` [R] are computed, chunks are of these. A chunk's copy of ``hidden`` and its gradient
    come out of the buffer's budget, and the buffer is as long as for all rows: no step needs more than they would.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        size: int | None,
        trained: bool,
        counted: Tensor | None = None,
    ) -> None:
        self.hidden, self.weight, self.counted = hidden, weight.to(dtype), counted
        self.bias = None if bias is None else bias.to(dtype)
        vocabulary = weight.shape[0]
        total = hidden.shape[0]
        self.rows = total if counted is None else counted.shape[0]
        width = vocabulary if counted is None else vocabulary + 2 * hidden.shape[1]
        # The gradient of a trained weight is summed over chunks: the fewer the better.
        halves = not trained
        cut = functools.partial(chunks, vocabulary=width, dtype=dtype, device=hidden.device, size=size, halves=halves)
        self.chunks = cut(self.rows)
        longest = self.chunks[0].stop if self.chunks else 0
        if counted is not None and total:
            longest = max(longest, cut(total)[0].stop)
        # Rows that start at multiples of 128 bytes keep cuBLAS and the kernel on their vectorised paths.
        stride = vocabulary if hidden.device.type == "cpu" else -(-vocabulary // 64) * 64
        self.buffer = hidden.new_empty((longest, stride), dtype=dtype)[:, :vocabulary]

    def logits(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For each chunk its rows, its part of ``hidden`` [C, H] and its logits [C, V], valid until the next."""
        transposed = self.weight.t()
        for rows in self.chunks:
            hidden = self.hidden[rows] if self.counted is None else self.hidden.index_select(0, self.counted[rows])
            hidden = hidden.to(self.weight.dtype)
            logits = self.buffer[: hidden.shape[0]]
            if self.bias is None:
                add_product(logits, hidden, transposed, 0.0, 1.0)
            else:
                add_product(logits.copy_(self.bias.expand_as(logits)), hidden, transposed, 1.0, 1.0)
            yield rows, hidden, logits


class Gradients:
    """Sums the products of logit gradients into the gradients that are wanted.

    Attributes:
        hidden: [T, H] in the compute dtype, zero in rows that were not computed; or None.
        weight: [V, H] in the weight's dtype after :meth:`finish`, summed in fp32 over the chunks; or None.
        bias: [V] in fp32, or None.
    """

    def __init__(self, head: _Head, needs: Needs) -> None:
        self.head = head
        dtype = head.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        # A single chunk has nothing to sum: its product is the gradient, and no fp32 copy exists.
        weight_dtype = dtype if len(head.chunks) == 1 else wide
        new = head.hidden.new_empty if head.counted is None else head.hidden.new_zeros
        self.hidden = new(head.hidden.shape, dtype=dtype) if needs[0] else None
        self.weight = torch.empty_like(head.weight, dtype=weight_dtype) if needs[1] else None
        self.bias = head.hidden.new_zeros(head.weight.shape[0], dtype=wide) if needs[2] else None
        if self.weight is not None and not head.chunks:
            self.weight.zero_()

    def add(self, rows: slice, hidden: Tensor, gradient: Tensor) -> None:
        """``gradient`` [C, V] with respect to the logits of ``hidden`` [C, H], which are ``rows`` of the whole."""
        if self.hidden is not None:
            if self.head.counted is None:
                add_product(self.hidden[rows], gradient, self.head.weight, 0.0, 1.0)
            else:
                self.hidden.index_copy_(0, self.head.counted[rows], gradient @ self.head.weight)
        if self.bias is not None:
            self.bias.add_(gradient.sum(0, dtype=self.bias.dtype))
        if self.weight is not None:
            _product(self.weight, gradient, hidden, accumulate=rows.start > 0)

    def finish(self, weight: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three gradients; that of the weight in the dtype of ``weight``."""
        return self.hidden, None if self.weight is None else self.weight.to(weight.dtype), self.bias


def _product(out: Tensor, gradient: Tensor, hidden: Tensor, accumulate: bool) -> None:
    """``gradientᵀ·hidden`` into ``out`` [V, H], in the accuracy of ``out``."""
    transposed = gradient.t()
    if out.dtype == hidden.dtype:
        add_product(out, transposed, hidden, float(accumulate), 1.0)
    elif not torch.compiler.is_compiling() and _accumulates(hidden.device, hidden.dtype):
        torch.ops.aten.addmm.dtype_out(out, transposed, hidden, out.dtype, beta=int(accumulate), out=out)
    else:
        for part, columns in zip(out.split(WEIGHT_ROWS), transposed.split(WEIGHT_ROWS), strict=True):
            product = columns @ hidden
            if accumulate:
                part.add_(product)
            else:
                part.copy_(product)


@functools.cache
def _accumulates(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch adds a 16-bit product to an fp32 matrix straight from the matrix unit.

    The operator exists since 2.8 for CUDA, and took an fp32 matrix to add to only later: asked by trying, once.
    """
    if device.type != "cuda" or not hasattr(torch.ops.aten.addmm, "dtype_out"):
        return False
    small = torch.zeros(16, 16, dtype=dtype, device=device)
    wide = small.float()
    try:
        torch.ops.aten.addmm.dtype_out(wide, small, small, wide.dtype, out=wide)
    except RuntimeError:
        return False
    return True


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    settings: Settings,
    dtype: torch.dtype,
    needs: Needs = (False, False, False),
    counted: Tensor | None = None,
) -> tuple[Rows, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The rows' results, and the gradients of ``-Σ logprob`` that ``needs`` names; of the rows ``counted``, or of all.
    ``targets`` are theirs.

    That of ``hidden`` is in ``dtype``, row by row, so that any upstream gradient of the log-probabilities can be
    multiplied in later; the other two suit an upstream that is the same for all rows.
    """
    ops = settings.ops(hidden.device, dtype)
    run = ops.token_logprobs_and_gradient if any(needs) else ops.token_logprobs
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = _Head(hidden, weight, bias, dtype, settings.chunk_size, needs[1], counted)
        found = Rows.empty(head.rows, head.buffer, settings)
        gradients = Gradients(head, needs)
        for rows, part, logits in head.logits():
            row = found.part(rows)
            run(logits, targets[rows], row.logprob, row.statistics, row.argmax, row.entropy, *settings.arguments)
            if any(needs):
                gradients.add(rows, part, logits)
        del head
        return found, gradients.finish(weight)


def backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    statistics: Tensor,
    entropy: Tensor | None,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    settings: Settings,
    dtype: torch.dtype,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients that ``needs`` names for any upstream gradients [T]; the logits are computed again."""
    ops = settings.ops(hidden.device, dtype)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = _Head(hidden, weight, bias, dtype, settings.chunk_size, needs[1])
        gradients = Gradients(head, needs)
        for rows, part, logits in head.logits():
            row = (None if tensor is None else tensor[rows] for tensor in (entropy, grad_logprob, grad_entropy))
            ops.token_logprobs_backward(logits, targets[rows], statistics[rows], *row, *settings.arguments)
            gradients.add(rows, part, logits)
        return gradients.finish(weight)
