"""The report: what was patched, what was refused or left alone, and why."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from fastplug.memory.plan import DECODED

PATCHED, REFUSED, LEFT = "patched", "refused", "left alone"


@dataclass(frozen=True)
class Decision:
    """The fate of one site."""

    role: str
    name: str
    module: str
    family: str
    status: str
    implementation: str | None = None
    reason: str | None = None


@dataclass
class Report:
    """Everything one ``apply`` decided.

    Attributes:
        model: The class of the model.
        device: The device of its parameters.
        options: The options as plain values.
        ops: Op name -> the implementation that runs it.
        decisions: One per site.
        notes: What holds for the model as a whole, e.g. that no family row matches it.
        fallbacks: Site name -> reason -> how many calls ran the original forward for that reason.
        memory: With the option ``memory``, for each language model its latest plan, what was predicted and measured.
    """

    model: str
    device: str
    options: dict[str, Any]
    ops: dict[str, str] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fallbacks: dict[str, dict[str, int]] = field(default_factory=dict)
    memory: list[dict[str, Any]] = field(default_factory=list)

    def of(self, status: str) -> list[Decision]:
        return [decision for decision in self.decisions if decision.status == status]

    @property
    def patched(self) -> list[Decision]:
        return self.of(PATCHED)

    @property
    def refused(self) -> list[Decision]:
        return self.of(REFUSED)

    def summary(self) -> str:
        """Three lines for a log: what was patched, what was not, and each distinct reason once."""
        lines = [f"fastplug: {self.model} on {self.device}: " + (_counts(self.patched) or "nothing patched")]
        others = Counter((d.status, d.role, d.reason) for d in self.decisions if d.status != PATCHED)
        for (status, role, reason), count in others.items():
            lines.append(f"fastplug: {status} {count} x {role}: {reason}")
        lines.extend(f"fastplug: {note}" for note in self.notes)
        by_reason: Counter[str] = Counter()
        for reasons in self.fallbacks.values():
            by_reason.update(reasons)
        lines.extend(f"fastplug: original forward in {count} calls: {reason}" for reason, count in by_reason.items())
        lines.extend(f"fastplug: {describe(plan)}" for plan in self.memory)
        return "\n".join(lines)

    __str__ = summary

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1)


def describe(memory: dict[str, Any]) -> str:
    """One line about a plan: how many layers keep what, and the predicted and measured peak."""
    start = f"memory={memory['memory']!r}"
    if memory["why_no_plan"] is not None:
        return f"{start}: no plan, {memory['why_no_plan']}"
    if "plan" not in memory:
        return f"{start}: the first training step makes the plan"
    plan, measured = memory["plan"], memory["measured_peak"]
    counts = Counter(plan["policies"])
    layers = ", ".join(f"{count} x {policy}" for policy, count in counts.items())
    decoded = plan["parts"].get(DECODED, 0)
    weights = f", {decoded / 2**30:.2f} GiB of the base decoded once and kept" if decoded else ""
    return (
        f"{start}: {plan['batch']} x {plan['sequence']} tokens, layers {layers}{weights}; peak "
        f"{memory['predicted_peak'] / 2**30:.2f} GiB planned"
        + (f", {measured / 2**30:.2f} GiB measured so far" if measured is not None else "")
        + (f"; memory ran out, {memory['dropped']} times a layer was dropped" if memory["dropped"] else "")
    )


def _counts(decisions: list[Decision]) -> str:
    counts = Counter((d.role, d.implementation, d.family.startswith("by structure")) for d in decisions)
    return ", ".join(
        f"{count} x {role} ({implementation}{', by structure, checked' if guessed else ''})"
        for (role, implementation, guessed), count in counts.items()
    )
