"""What a run will need, before a GPU is rented: every policy, the best plan, and how far the memory reaches."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastplug.memory.around import fixed_bytes
from fastplug.memory.bytes import Step
from fastplug.memory.estimate import best_plan, least, uniform_plan
from fastplug.memory.gpus import GPU
from fastplug.memory.meter import CONTEXT
from fastplug.memory.plan import Plan
from fastplug.memory.policy import Policy
from fastplug.memory.shapes import ModelShape
from fastplug.memory.solve import DoesNotFit

if TYPE_CHECKING:
    from rich.console import Group

RESERVED = 0.05
"""Reserved beyond allocated bytes where nothing was measured yet: 3 to 7% on an H100, at 1,024 and 8,192 tokens."""
LENGTHS = 64  # sequence lengths are multiples of this
LONGEST = 2**24
MOST = 2**16  # sequences in a batch


@dataclass(frozen=True)
class Forecast:
    """The answer of ``fastplug plan``.

    Attributes:
        plan: The fastest plan within the budget.
        uniform: What it needs if every layer has the same policy, whether or not that fits.
        longest_context: The longest sequence, a multiple of 64, that fits at the plan's batch; 0 if none does.
        largest_batch: The largest batch that fits at the plan's length.
        longest_host, largest_host: Bytes of host memory that these two need.
        notes: What the reader should know beside the numbers.
    """

    plan: Plan
    uniform: dict[Policy, Plan]
    longest_context: int
    largest_batch: int
    longest_host: int = 0
    largest_host: int = 0
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
    notes: tuple[str, ...] = (),
) -> Forecast:
    """Plan a step of ``batch`` x ``length`` tokens within ``budget`` bytes; see :mod:`fastplug.memory.estimate`.

    Raises:
        DoesNotFit: Nothing fits; the message says what does, where something does.
    """
    given: dict[str, Any] = {"optimizer": optimizer, "accumulating": accumulating, "context": context, "slack": slack}

    def fits(batch: int, length: int) -> bool:
        return least(shape, batch, length, policies=policies, host_budget=host_budget, **given) <= budget

    longest = LENGTHS * _largest(lambda count: fits(batch, LENGTHS * count), LONGEST // LENGTHS)
    largest = _largest(lambda count: fits(count, length), MOST)
    try:
        plan = best_plan(shape, batch, length, budget, gpu=gpu, policies=policies, host_budget=host_budget, **given)
    except DoesNotFit as error:
        raise DoesNotFit(f"{error}{_instead(batch, length, longest, largest)}", error.least) from None
    uniform = {
        policy: uniform_plan(shape, batch, length, budget, policy, gpu=gpu, **given)
        for policy in Policy
        if policy in policies and any(_has(layer, policy) for layer in shape.layers)
    }
    furthest = [
        best_plan(shape, *size, budget, gpu=gpu, policies=policies, host_budget=host_budget, **given)
        for size in ((batch, longest or length), (largest or batch, length))
    ]
    every = notes + _notes(shape, batch, length, optimizer)
    return Forecast(plan, uniform, longest, largest, furthest[0].host_bytes, furthest[1].host_bytes, every)


def _has(layer: Any, policy: Policy) -> bool:
    from fastplug.memory.estimate import policies_of

    return policy in policies_of(layer)


def _instead(batch: int, length: int, longest: int, largest: int) -> str:
    if not longest and not largest:
        return ""
    ways = [f"{batch} x {longest} tokens"] if longest else []
    ways += [f"{largest} x {length} tokens"] if largest else []
    return f"; what fits is {' or '.join(ways)}"


def _notes(shape: ModelShape, batch: int, length: int, optimizer: str) -> tuple[str, ...]:
    found = list(shape.notes)
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
        found.append("the paged optimizer's states are counted as host memory")
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


__all__ = ["RESERVED", "Forecast", "forecast"]
