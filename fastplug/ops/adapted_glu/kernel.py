"""The gated unit with the adapters around it in one kernel each way, on Hopper GPUs.

Not used yet: it has been compiled for these GPUs and run in a model of them on the CPU, and no kernel counts as done
before it was right and faster on one. ``USED`` is for tests, and ``fastplug+trial=adapted_glu`` in ``benchmarks.step``.
The functions are those of ``reference``.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from fastplug.ops.adapted_glu.reference import Adapted, Thin
from fastplug.ops.gluon import aligned, attempt, multiprocessors

USED = False
ACTIVATIONS = ("silu", "gelu_tanh")
RANKS = (16, 32, 64)  # that a kernel is compiled for; smaller ranks are filled up with zeros
MULTIPLE = 8  # of ranks and channels: 16 bytes, for the copy engine
Key = tuple[str, str, int, torch.dtype]  # direction, activation, rank, dtype: what is compiled
CHUNK = 8192  # tokens of a launch of the backward, whose partial sums take 14 KiB a token in an 8B Llama

broken: dict[Key, list[str]] = {}
"""Why a kernel is used no more, once a version of Triton could not compile it.

Each on its own: gate and up of a forward that has run are as it left them, whatever happens to another one later.
"""


def suits(tokens: int, adapted: Adapted, activation: str) -> bool:
    """See :func:`fastplug.ops.adapted_glu.reference.suits`."""
    if not USED or torch.compiler.is_compiling() or activation not in ACTIVATIONS:
        return False
    xa, b, columns, a = adapted
    ranks = [part.stop - part.start for part in columns] + [len(a)]
    if not tokens or max(ranks) > RANKS[-1] or any(rank % MULTIPLE for rank in ranks) or a.shape[1] % MULTIPLE:
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
    T, N = d_out.shape
    rank = _rank(adapted)
    total = torch.zeros(T, adapted.xa.shape[1], dtype=torch.float32, device=gate_up.device)
    sums: torch.Tensor | None = None
    for start in range(0, T, CHUNK):
        rows = slice(start, min(start + CHUNK, T))
        mine = adapted._replace(xa=adapted.xa[rows])
        tensors = (d_out[rows], gb[rows], gate_up[rows], d_gate_up[rows])
        parts = _attempt("backward", mine, activation, *tensors)
        if parts is None:
            return None
        for i, columns in enumerate(adapted.columns):
            width = columns.stop - columns.start
            total[rows, columns] += parts[0][:, :, i * rank : i * rank + width].sum(0)
        found = parts[1].sum(0)
        sums = found if sums is None else sums.add_(found)
    assert sums is not None
    b = torch.zeros(2 * N, adapted.b.shape[1], dtype=torch.float32, device=gate_up.device)
    for i, columns in enumerate(adapted.columns):
        b[i * N : (i + 1) * N, columns] = sums[i, :, : columns.stop - columns.start]
    return Thin(total, b, sums[2, :, : len(adapted.a)].t())


def _rank(adapted: Adapted) -> int:
    largest = max(*(part.stop - part.start for part in adapted.columns), len(adapted.a))
    return next(rank for rank in RANKS if rank >= largest)


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
