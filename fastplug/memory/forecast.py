"""What a run will need, before a GPU is rented: every policy, the best plan, and how far the memory reaches."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastplug.graphs.replay import FLOPS
from fastplug.memory.around import fixed_bytes, optimizer_bytes
from fastplug.memory.budget import gib
from fastplug.memory.bytes import Step
from fastplug.memory.estimate import best_plan, keepable, least, uniform_plan, with_decoded
from fastplug.memory.gpus import GPU
from fastplug.memory.plan import Plan
from fastplug.memory.policy import Policy
from fastplug.memory.reserve import Reserve
from fastplug.memory.saved import PIECE
from fastplug.memory.shapes import ModelShape
from fastplug.memory.solve import DoesNotFit

if TYPE_CHECKING:
    from rich.console import Group

RESERVED = 0.05
"""Reserved beyond allocated bytes where nothing was measured yet: 5 to 6% in most steps under budgets on an H100, 0 to
11% in all. Where nobody limits the allocator it is more, half of the allocated and above in short steps."""
CONTEXT = 840 * 2**20
"""Bytes of the CUDA context once a step's kernels are loaded: 0.73 to 0.83 GiB on H100s. A run measures its own."""
LENGTHS = 64  # sequence lengths are multiples of this
LONGEST = 2**24
MOST = 2**16  # sequences in a batch
LARGEST_HOST = 2**44  # bytes


@dataclass(frozen=True)
class Forecast:
    """The answer of ``fastplug plan``.

    A plan's ``allocated`` is what tensors take at the peak, its ``total`` reserved memory and the CUDA context: what a
    budget means.

    Attributes:
        plan: The fastest plan within the budget.
        uniform: What it needs if every layer has the same policy, whether or not that fits.
        longest_context: The longest sequence, a multiple of 64, that fits at the plan's batch; 0 if none does. It may
            be more than the model has ``positions``.
        largest_batch: The largest batch that fits at the plan's length.
        longest_host, largest_host: Bytes of host memory that these two need.
        host_budget: Bytes of host memory that they may take; None: any.
        positions: The longest sequence that the model's config was made for; 0 where it does not say.
        assumed: What the numbers rest on, in words, by name: ``budget``, ``reserve``, ``times``, ``host`` and, where
            the model says it, ``positions``.
        notes: What the reader should know beside the numbers.
    """

    plan: Plan
    uniform: dict[Policy, Plan]
    longest_context: int
    largest_batch: int
    longest_host: int = 0
    largest_host: int = 0
    host_budget: int | None = None
    positions: int = 0
    assumed: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The forecast as plain values."""
        return {
            "plan": {**self.plan.as_dict(), "total": self.plan.total, "allocated": self.plan.allocated},
            "uniform": {
                policy.value: {
                    "parts": dict(plan.parts),
                    "total": plan.total,
                    "allocated": plan.allocated,
                    "moment": plan.moment,
                    "logits": plan.logits,
                    "ms": plan.ms,
                    "fits": plan.fits,
                    "host_bytes": plan.host_bytes,
                }
                for policy, plan in self.uniform.items()
            },
            "longest_context": self.longest_context,
            "largest_batch": self.largest_batch,
            "longest_host": self.longest_host,
            "largest_host": self.largest_host,
            "host_budget": self.host_budget,
            "positions": self.positions,
            "assumed": dict(self.assumed),
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """The forecast as JSON text."""
        return json.dumps(self.as_dict(), indent=1)

    def table(self) -> Group:
        """The tables that ``fastplug plan`` prints, for rich."""
        from fastplug.memory.showing import forecast_tables

        return forecast_tables(self)

    def __rich__(self) -> Group:
        return self.table()

    def picture(self, path: str | Path) -> Path:
        """Draw a stacked bar for every policy and for the plan. Needs matplotlib; see :meth:`Plan.picture`."""
        from fastplug.memory.showing import draw

        return draw({policy.value: plan for policy, plan in self.uniform.items()} | {"plan": self.plan}, path)


def forecast(
    shape: ModelShape,
    batch: int,
    length: int,
    budget: int,
    *,
    gpu: GPU,
    optimizer: str = "adamw",
    accumulating: bool = False,
    policies: Sequence[Policy] = tuple(Policy),
    host_budget: int | None = None,
    context: int = CONTEXT,
    slack: float = RESERVED,
    guessed: bool = False,
    budget_from: str = "",
    notes: tuple[str, ...] = (),
) -> Forecast:
    """Plan a step of ``batch`` x ``length`` tokens within ``budget`` bytes; see :mod:`fastplug.memory.estimate`.

    ``guessed`` says that nobody named ``gpu``, ``budget_from`` where the budget comes from.

    Raises:
        DoesNotFit: Nothing fits; the message says what does, where something does, and which memory is too little.
    """
    given: dict[str, Any] = {"optimizer": optimizer, "accumulating": accumulating, "context": context, "slack": slack}

    def need(batch: int, length: int, host: int | None) -> int:
        return least(shape, batch, length, policies=policies, host_budget=host, **given)

    def fits(batch: int, length: int) -> bool:
        return need(batch, length, host_budget) <= budget

    longest = LENGTHS * _largest(lambda count: fits(batch, LENGTHS * count), LONGEST // LENGTHS)
    largest = _largest(lambda count: fits(count, length), MOST)
    try:
        plan = best_plan(shape, batch, length, budget, gpu=gpu, policies=policies, host_budget=host_budget, **given)
    except DoesNotFit as error:
        host = None if host_budget is None else _host_needed(lambda host: need(batch, length, host) <= budget)
        why = str(error) if host is None else _too_little_host(batch, length, budget, host_budget or 0, host, error)
        raise DoesNotFit(f"{why}{_instead(batch, length, longest, largest)}", error.least) from None
    if not _short(shape, batch * length):  # layers that are recorded decode
        weights = keepable(shape, Step.of(shape, batch, length, gpu=gpu), gpu)
        plan = with_decoded(plan, budget - plan.total, weights, slack)
    uniform = {
        policy: uniform_plan(shape, batch, length, budget, policy, gpu=gpu, **given)
        for policy in Policy
        if policy in policies and any(_has(layer, policy) for layer in shape.layers)
    }
    furthest = [
        best_plan(shape, *size, budget, gpu=gpu, policies=policies, host_budget=host_budget, **given)
        for size in ((batch, longest or length), (largest or batch, length))
    ]
    return Forecast(
        plan,
        uniform,
        longest,
        largest,
        longest_host=furthest[0].host_bytes,
        largest_host=furthest[1].host_bytes,
        host_budget=host_budget,
        positions=shape.positions,
        assumed={
            "budget": f"{budget_from or gib(budget)}; {gib(budget - context)} without the CUDA context",
            "reserve": f"what PyTorch's allocator has beside, {Reserve.of(slack, shape.weight_bytes)}, "
            f"and {gib(context)} of CUDA context",
            "times": _times(gpu, guessed, _short(shape, batch * length)),
            "host": _host(host_budget),
            **({"positions": _positions(shape)} if shape.positions else {}),
        },
        notes=notes + _notes(shape, batch, length, longest, optimizer),
    )


def _times(gpu: GPU, guessed: bool, short: bool) -> str:
    found = f"guessed, as of one {gpu.name}, whose memory is nearest" if guessed else f"as of one {gpu.name}"
    found += "; the GPU is taken to never wait for Python"
    return found + (", as it does in so short a step unless CUDA graphs are recorded" if short else "")


def _short(shape: ModelShape, tokens: int) -> bool:
    """Whether layers are done before Python has launched them: see ``graphs/replay.py``."""
    weights = max(sum(linear.weights * layer.active for linear in layer.linears) for layer in shape.layers)
    return 4 * tokens * weights <= FLOPS


def _host(host_budget: int | None) -> str:
    return "as much as it takes; --host-memory limits it" if host_budget is None else f"{gib(host_budget)} at most"


def _positions(shape: ModelShape) -> str:
    return f"{shape.positions:,}" + (f" (rope scaling: {shape.rope})" if shape.rope else "")


def _host_needed(fits: Callable[[int], bool]) -> int | None:
    """The least host memory, in whole pieces, with which a step fits the GPU; None if none is enough."""
    if not fits(LARGEST_HOST):
        return None
    return PIECE * (1 + _largest(lambda count: not fits(PIECE * count), LARGEST_HOST // PIECE))


def _too_little_host(batch: int, length: int, budget: int, has: int, wants: int, error: DoesNotFit) -> str:
    return (
        f"fastplug: {gib(has)} of host memory is too little: for {batch} x {length} tokens to fit {gib(budget)} of the "
        f"GPU, layers have to keep {gib(wants)} in the host's memory; with {gib(has)} the GPU needs "
        f"{gib(error.least)}; give more host memory, a larger budget, a shorter sequence or a smaller batch"
    )


def _has(layer: Any, policy: Policy) -> bool:
    from fastplug.memory.estimate import policies_of

    return policy in policies_of(layer)


def _instead(batch: int, length: int, longest: int, largest: int) -> str:
    if not longest and not largest:
        return ""
    ways = [f"{batch} x {longest} tokens"] if longest else []
    ways += [f"{largest} x {length} tokens"] if largest else []
    return f"; what fits is {' or '.join(ways)}"


def _notes(shape: ModelShape, batch: int, length: int, longest: int, optimizer: str) -> tuple[str, ...]:
    found = list(shape.notes)
    if 0 < shape.positions < max(length, longest):
        found.append(
            f"more than {shape.positions:,} tokens may fit the memory, but not the model, whose config has no more "
            "positions (max_position_embeddings)"
        )
    unfused = sum(not layer.fused for layer in shape.layers)
    if unfused:
        found.append(
            f"{unfused} of {len(shape.layers)} layers run as the host wrote them: they keep what they keep, and their "
            "bytes are an estimate"
        )
    elif any(not layer.gated and not layer.gate_up for layer in shape.layers):
        found.append("experts run as the host wrote them: their bytes are an estimate")
    step = Step.of(shape, batch, length)
    masks = sum(step.masked(layer) for layer in shape.layers)
    if masks:
        found.append(
            f"{masks} layers attend within a window under a mask of {length} x {length}; flash_attention_2 needs none"
        )
    if optimizer.startswith("paged"):
        states = gib(optimizer_bytes(shape.trained, optimizer.removeprefix("paged_")))
        found.append(f"the paged optimizer's states, {states}, are taken to be in host memory, beside what layers have")
    if not fixed_bytes(shape, "adamw").get("optimizer"):
        found.append("nothing is trained: no adapter and no weight has a gradient")
    return tuple(found)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest count up to ``most`` that fits, by bisection; 0 if one does not."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


__all__ = ["CONTEXT", "RESERVED", "Forecast", "forecast"]
