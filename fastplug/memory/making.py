"""The plan for one shape of a micro-batch, made of numbers that were agreed on: no state, and the same on all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastplug.memory import recordings
from fastplug.memory.budget import FORCED, gib
from fastplug.memory.calibration import Agreed
from fastplug.memory.costs import LayerCosts
from fastplug.memory.estimate import Estimate, in_comparison, with_decoded
from fastplug.memory.moments import assemble
from fastplug.memory.plan import Plan
from fastplug.memory.policy import Policy
from fastplug.memory.reading import Reading
from fastplug.memory.solve import DoesNotFit, solve

GAIN = 0.99  # of the present plan's time that another one has to stay below: each change unsettles the allocator
OTHERWISE = 0.95  # likewise, where both copy and it does so in another way, of which less is known
COMPARABLE = 1.25  # of a plan's time within which one without copies may turn out to be faster
LAUNCHES = 6.0  # milliseconds that Python needs to launch a layer that is not recorded: see graphs/replay.py
TRIES = 6  # smaller budgets that are tried until recorded layers fit
Costs = tuple[LayerCosts, ...]


@dataclass(frozen=True)
class Made:
    """A plan.

    Attributes:
        plan: The plan.
        reasoned: The costs that it was made of, before anything measured changed them.
        recorded: Whether layers may be recorded as CUDA graphs under it.
        note: What the user should know of it.
    """

    plan: Plan
    reasoned: Costs
    recorded: bool = False
    note: str | None = None


class Maker:
    """Makes plans for a micro-batch of one shape.

    Args:
        reading: The model.
        agreed: What was agreed on.
        shape: Batch, and length on the grid.
        memory: The option.
        before: The plan that was followed for this shape so far: one that still fits is left for a gain only.
        beside: Bytes that recorded layers hold which were recorded for other shapes.
        recordable: Whether layers may be recorded at all.
    """

    def __init__(
        self,
        reading: Reading,
        agreed: Agreed,
        shape: tuple[int, int],
        memory: Any,
        before: Plan | None = None,
        beside: int = 0,
        recordable: bool = False,
    ) -> None:
        self.reading, self.agreed, self.shape, self.before = reading, agreed, shape, before
        self.forced = {"keep": Policy.KEEP, "full": Policy.RESIDUAL}[memory] if memory in FORCED else None
        self.fixed = {"model and optimizer": agreed.fixed + agreed.extra}
        if beside:
            self.fixed["recorded layers of other shapes"] = beside
        self.recordable = recordable and reading.records(*shape)

    def make(self, first: bool) -> Made:
        """The fastest plan.

        Args:
            first: Whether nothing has run yet, so that a budget into which nothing fits can be refused.

        Raises:
            DoesNotFit: ``first``, and nothing fits, whatever the optimizer will keep.
        """
        return self._told(self.forced) if self.forced is not None else self._with_decoded(self._fastest(first))

    def _fastest(self, first: bool) -> Made:
        """The fastest plan of layers that are recorded or that are not, whichever takes less time."""
        recorded = self._recorded() if self.recordable else None
        if recorded is None:
            return self._best(first)
        if set(recorded.plan.policies) == {Policy.KEEP}:
            return recorded
        other = self._best(first=False)
        waits = max(in_comparison(other.plan), LAUNCHES * len(other.plan.policies))
        return recorded if not other.plan.fits or in_comparison(recorded.plan) <= waits else other

    def follow(self, plan: Plan) -> Made:
        """A plan that was saved."""
        if self.forced is None and self.recordable and set(plan.policies) <= {*recordings.RECORDABLE}:
            ((_, reasoned),) = self.reading.estimates(*self.shape, recorded=True)
            layers = self.agreed.apply(reasoned.layers)
            if plan.tile_rows is None and _possible(plan, layers):
                made = self._with_recordings(self._given(reasoned, layers, plan.policies), reasoned, layers)
                if made.total <= recordings.FULL * plan.budget:
                    return Made(plan, reasoned.layers, recorded=True)
        return Made(plan, dict(self.reading.estimates(*self.shape))[plan.tile_rows].layers)

    def without_copies(self, plan: Plan) -> Plan | None:
        """The fastest plan that copies nothing to the host's memory, if one fits that may be as fast as ``plan``."""
        reasoned = dict(self.reading.estimates(*self.shape))[plan.tile_rows]
        try:
            found = self._on_device(reasoned, self.agreed.apply(reasoned.layers), self.agreed.available)
        except DoesNotFit:
            return None
        return replace(found, tile_rows=plan.tile_rows) if found.ms <= COMPARABLE * plan.ms else None

    def _with_decoded(self, made: Made) -> Made:
        """Spend what is left on decoded weights that stay, but for recorded layers: what their graphs read has to stay,
        and weights go where memory runs out."""
        if made.recorded:
            return made
        left = made.plan.budget - made.plan.total - self.agreed.caution
        weights = self.reading.decoded(*self.shape)
        return replace(made, plan=with_decoded(made.plan, left, weights, self.agreed.slack))

    def _told(self, policy: Policy) -> Made:
        """All layers keep what the user says."""
        _, reasoned = self.reading.estimates(*self.shape, recorded=self.recordable)[0]
        layers = self.agreed.apply(reasoned.layers)
        policies = [policy if policy in layer.policies else Policy.KEEP for layer in layers]
        return Made(self._given(reasoned, layers, policies), reasoned.layers, self.recordable)

    def _recorded(self) -> Made | None:
        """The fastest plan whose layers can be recorded, if one fits."""
        ((_, reasoned),) = self.reading.estimates(*self.shape, recorded=True)
        layers = tuple(layer.only(*recordings.RECORDABLE) for layer in self.agreed.apply(reasoned.layers))
        budget = self.agreed.available
        for _ in range(TRIES):
            try:
                plan = self._sticky(self._solved(reasoned, layers, budget), reasoned, layers)
            except DoesNotFit:
                return None
            whole = self._with_recordings(replace(plan, budget=self.agreed.available), reasoned, layers)
            over = whole.total - int(recordings.FULL * whole.budget)
            if over <= 0:
                return Made(whole, reasoned.layers, recorded=True)
            budget = plan.total - over
        return None

    def _with_recordings(self, plan: Plan, reasoned: Estimate, layers: Costs) -> Plan:
        more = recordings.beyond(plan, layers, reasoned.head_peak, self.agreed, sum(self.fixed.values()))
        return replace(plan, parts={**plan.parts, "slack": plan.parts.get("slack", 0) + more})

    def _best(self, first: bool) -> Made:
        """The fastest plan of layers that are not recorded, in tiles or not; the least where none fits."""
        found: list[Made] = []
        least: list[Made] = []
        errors: list[DoesNotFit] = []
        for rows, reasoned in self.reading.estimates(*self.shape):
            layers = self.agreed.apply(reasoned.layers)
            try:
                plan = replace(self._cautious(reasoned, layers), tile_rows=rows)
            except DoesNotFit as error:
                errors.append(error)
                plan = replace(self._solved(reasoned, layers, error.least), budget=self.agreed.available)
                least.append(Made(replace(plan, tile_rows=rows), reasoned.layers))
                continue
            found.append(Made(self._sticky(plan, reasoned, layers), reasoned.layers))
            if set(plan.policies) == {Policy.KEEP}:
                break
        if found:
            return min(found, key=lambda made: in_comparison(made.plan))
        nearest = min(errors, key=lambda failed: failed.least)
        return self._with_least(min(least, key=lambda made: made.plan.total), nearest, first)

    def _with_least(self, made: Made, error: DoesNotFit, first: bool) -> Made:
        """The least plan, although it does not fit, with the reason to go on with it."""
        assumed, budget = self.agreed.assumed, made.plan.budget
        if assumed and error.least - int((1 + self.agreed.slack) * assumed) <= budget:
            return replace(
                made,
                note=f"no optimizer is known yet, and with {gib(assumed)} for the states of an AdamW the least that a "
                f"step needs is {gib(error.least)} of the {gib(budget)} that there are; the first steps go on with the "
                "least that layers can keep, and are planned anew once an optimizer has stepped",
            )
        if first:
            raise error
        why = str(error).removeprefix("fastplug: ")
        return replace(made, note=f"{why}; the step goes on with the least that layers can keep")

    def _sticky(self, plan: Plan, reasoned: Estimate, layers: Costs) -> Plan:
        """The plan before, where it still fits and the new one gains too little."""
        before = self.before
        if before is None or before.tile_rows != plan.tile_rows or not _possible(before, layers):
            return plan
        same = replace(self._given(reasoned, layers, before.policies), tile_rows=before.tile_rows)
        most = self.agreed.host if self.agreed.copies else plan.host_bytes  # what copies more was found to be slower
        fits = same.fits and same.host_bytes <= most
        new = {policy for policy in plan.policies if policy.offloads} - {*before.policies}
        gain = OTHERWISE if new and before.host_bytes else GAIN
        return same if fits and gain * same.ms <= plan.ms else plan

    def _cautious(self, reasoned: Estimate, layers: Costs) -> Plan:
        """The fastest plan, with caution where there is room for it."""
        available = self.agreed.available
        if self.agreed.caution:
            with contextlib.suppress(DoesNotFit):
                return replace(self._solved(reasoned, layers, available - self.agreed.caution), budget=available)
        return self._solved(reasoned, layers, available)

    def _solved(self, reasoned: Estimate, layers: Costs, budget: int) -> Plan:
        if not self.agreed.copies:
            with contextlib.suppress(DoesNotFit):
                return self._on_device(reasoned, layers, budget)
        return solve(layers, self.fixed, budget, host_budget=self.agreed.host, **self._more(reasoned))

    def _on_device(self, reasoned: Estimate, layers: Costs, budget: int) -> Plan:
        """The fastest plan that copies nothing to the host's memory."""
        here = tuple(layer.only(*(policy for policy in layer.policies if not policy.offloads)) for layer in layers)
        return solve(here, self.fixed, budget, **self._more(reasoned))

    def _given(self, reasoned: Estimate, layers: Costs, policies: Sequence[Policy]) -> Plan:
        return assemble(layers, policies, self.fixed, self.agreed.available, **self._more(reasoned))

    def _more(self, reasoned: Estimate) -> dict[str, Any]:
        return {
            "head_peak": reasoned.head_peak,
            "accumulating": self.agreed.accumulating,
            "context": self.agreed.context,
            "reserve": self.agreed.reserve,
            "other_ms": reasoned.other_ms,
            "batch": self.shape[0],
            "sequence": self.shape[1],
        }


def _possible(plan: Plan, layers: Costs) -> bool:
    """Whether the layers can have the policies that the plan gives them."""
    return all(policy in layer.policies for policy, layer in zip(plan.policies, layers, strict=True))


__all__ = ["Made", "Maker"]
