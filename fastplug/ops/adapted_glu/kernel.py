"""The gated unit with the adapters around it in one kernel each way, on Hopper GPUs.

The functions are those of ``reference``.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from fastplug.ops.adapted_glu import sums
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


def forward(
    gate_up: torch.Tensor, adapted: Adapted, activation: str, out: torch.Tensor, scaling: float = 1.0
) -> torch.Tensor | None:
    """See :func:`fastplug.ops.adapted_glu.reference.forward`."""
    found = _attempt("forward", adapted, activation, gate_up, out)
    if found is None:
        return None
    xa = torch.empty(len(out), len(adapted.a), dtype=out.dtype, device=out.device)
    parts, stretches = found
    sums.of_rows(parts, stretches, scaling, xa)
    return xa


def backward(
    d_out: torch.Tensor,
    gb: torch.Tensor,
    gate_up: torch.Tensor,
    adapted: Adapted,
    activation: str,
    d_gate_up: torch.Tensor,
    scalings: tuple[float, float] = (1.0, 1.0),
    rstd: torch.Tensor | None = None,
) -> Thin | None:
    """See :func:`fastplug.ops.adapted_glu.reference.backward`."""
    if not all(map(aligned, (d_out, gb, gate_up, d_gate_up))):  # those of the forward are, where it suits
        return None
    (tokens, width), device = d_out.shape, d_out.device
    of_xa = torch.empty(adapted.xa.shape, dtype=d_out.dtype, device=device)
    normed = None if rstd is None else torch.empty_like(of_xa)
    of_b = torch.empty(2, width, _rank(adapted), dtype=torch.float32, device=device)
    of_a = torch.empty(adapted.a.shape, dtype=torch.float32, device=device)
    for start in range(0, tokens, CHUNK):
        rows = slice(start, start + CHUNK)
        mine = adapted._replace(xa=adapted.xa[rows])
        found = _attempt("backward", mine, activation, d_out[rows], gb[rows], gate_up[rows], d_gate_up[rows])
        if found is None:
            return None
        gb_parts, ab_parts, stretches, sub = found
        times_rstd, its_rstd = (None if tensor is None else tensor[rows] for tensor in (normed, rstd))
        out = sums.Columns(of_xa[rows], times_rstd, its_rstd, of_b, of_a)
        sums.of_columns(gb_parts, ab_parts, stretches, sub, adapted.columns, scalings, out, add=start > 0)
    ranks = [columns.stop - columns.start for columns in adapted.columns]
    return Thin(of_xa, tuple(of_b[i, :, :rank] for i, rank in enumerate(ranks)), of_a, normed)


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
