"""The gated unit with the adapters around it in one kernel each way, on Hopper GPUs.

The functions are those of ``reference``.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from fastplug.ops.adapted_glu.reference import Adapted, Thin
from fastplug.ops.adapted_glu.sizes import CHUNK, compiled_rank, covers
from fastplug.ops.gluon import aligned, attempt, multiprocessors

ACTIVATIONS = ("silu", "gelu_tanh")
Key = tuple[str, str, int, torch.dtype]  # direction, activation, rank, dtype: what is compiled

broken: dict[Key, list[str]] = {}
"""Why a kernel is used no more, once a version of Triton could not compile it.

Each on its own: gate and up of a forward that has run are as it left them, whatever happens to another one later.
"""


def suits(tokens: int, adapted: Adapted, activation: str) -> bool:
    """See :func:`fastplug.ops.adapted_glu.reference.suits`."""
    if torch.compiler.is_compiling() or activation not in ACTIVATIONS:
        return False
    xa, b, _, a = adapted
    if not tokens or not covers(a.shape[1], *_ranks(adapted)):
        return False
    if xa.dtype not in (torch.bfloat16, torch.float16) or not xa.dtype == b.dtype == a.dtype:
        return False
    if broken.get(("forward", activation, _rank(adapted), xa.dtype)):
        return False
    return bool(multiprocessors(xa.device)) and all(map(aligned, (xa, b, a)))


def forward(gate_up: torch.Tensor, adapted: Adapted, activation: str, out: torch.Tensor) -> torch.Tensor | None:
    """See :func:`fastplug.ops.adapted_glu.reference.forward`."""
    parts = _attempt("forward", adapted, activation, gate_up, out)
    return None if parts is None else parts.sum(0)[:, : len(adapted.a)]


def backward(
    d_out: torch.Tensor,
    gb: torch.Tensor,
    gate_up: torch.Tensor,
    adapted: Adapted,
    activation: str,
    d_gate_up: torch.Tensor,
) -> Thin | None:
    """See :func:`fastplug.ops.adapted_glu.reference.backward`."""
    if not all(map(aligned, (d_out, gb, gate_up, d_gate_up))):  # those of the forward are, where it suits
        return None
    rank, sums = _rank(adapted), []
    for start in range(0, len(d_out), CHUNK):
        rows = slice(start, start + CHUNK)
        mine = adapted._replace(xa=adapted.xa[rows])
        parts = _attempt("backward", mine, activation, d_out[rows], gb[rows], gate_up[rows], d_gate_up[rows])
        if parts is None:
            return None
        sums.append([part.sum(0, dtype=torch.float32) for part in parts])
    thin = sums[0][0] if len(sums) == 1 else torch.cat([part for part, _ in sums])
    of_matrices = sums[0][1]
    for _, part in sums[1:]:
        of_matrices.add_(part)
    widths = [columns.stop - columns.start for columns in adapted.columns]
    b = tuple(of_matrices[i, :, :width] for i, width in enumerate(widths))
    return Thin(_in_columns(thin, adapted, rank), b, of_matrices[2, :, : len(adapted.a)].t())


def _in_columns(thin: torch.Tensor, adapted: Adapted, rank: int) -> torch.Tensor:
    """The gradient of ``adapted.xa`` from gate's columns and up's [T, 2 rank], each filled up with zeros."""
    gate, up = adapted.columns
    if (gate, up) == (slice(0, rank), slice(rank, 2 * rank)):
        return thin
    total = torch.zeros_like(adapted.xa, dtype=thin.dtype)
    for i, columns in enumerate((gate, up)):
        total[:, columns] += thin[:, i * rank : i * rank + columns.stop - columns.start]
    return total


def _ranks(adapted: Adapted) -> list[int]:
    """Of gate, up and down."""
    return [*(part.stop - part.start for part in adapted.columns), len(adapted.a)]


def _rank(adapted: Adapted) -> int:
    return compiled_rank(*_ranks(adapted))


def launcher(direction: str) -> Any:
    module = importlib.import_module(f"fastplug.ops.adapted_glu.hopper_{direction}")  # Gluon takes its time to import
    return module.launch


def _attempt(direction: str, adapted: Adapted, activation: str, *matrices: torch.Tensor) -> Any:
    """The launcher's result, or None where it cannot be compiled.

    A block of ``rank`` columns may reach over an adapter's own into the other's, where its rows of B are zero.
    """
    rank, N = _rank(adapted), adapted.a.shape[1]
    errors = broken.setdefault((direction, activation, rank, adapted.xa.dtype), [])
    if errors:
        return None
    xa = tuple(adapted.xa[:, columns.start :] for columns in adapted.columns)
    b = tuple(adapted.b[i * N : (i + 1) * N, columns.start :] for i, columns in enumerate(adapted.columns))

    def call() -> Any:
        processors = multiprocessors(adapted.xa.device)
        return launcher(direction)(*matrices, xa, b, adapted.a, rank, processors, activation)

    return attempt(errors, "adapters of gated MLPs are added in passes of their own", call)
