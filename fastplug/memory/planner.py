"""What one model plans from: a plan for each shape of a micro-batch, out of numbers that are renewed now and then."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastplug.errors import OptionError
from fastplug.graphs.replay import padded_length
from fastplug.memory import agreement
from fastplug.memory.budget import FORCED, gib
from fastplug.memory.calibration import Agreed, Observation
from fastplug.memory.costs import LayerCosts
from fastplug.memory.estimate import in_comparison
from fastplug.memory.meter import Meter, meter_for
from fastplug.memory.moments import assemble
from fastplug.memory.oom import Room
from fastplug.memory.plan import Plan
from fastplug.memory.policy import Policy
from fastplug.memory.reading import Reading
from fastplug.memory.solve import DoesNotFit, solve
from fastplug.memory.stock import Stock, budget_of, of_all
from fastplug.options import Options
from fastplug.patching.report import Report
from fastplug.patching.sites import KEY, Site

logger = logging.getLogger("fastplug")
GAIN = 0.99  # of the present plan's time that another one has to stay below: each change unsettles the allocator
TIGHT = 0.9  # of its budget that a plan needs for scattered free memory to matter
RECORDED = 0.5  # CUDA graphs hold what their layers keep for good: only where a plan needs no more of its budget
Shape = tuple[int, int]  # batch, and length on the grid
Costs = tuple[LayerCosts, ...]


class Planner:
    """Decides what the decoder layers of one model keep.

    Args:
        model: The language model.
        sites: Its decoder layers in order, and whether each is patched as a whole.
        options: With ``memory`` set.
        report: Where notes go.

    Raises:
        OptionError: The budget is smaller than the weights.
    """

    def __init__(self, model: nn.Module, sites: Sequence[tuple[Site, bool]], options: Options, report: Report) -> None:
        self.options, self.count = options, len(sites)
        self.off: str | None = None
        self.room = Room(self._release, self._ran_out)
        self.plan: Plan | None = None
        self.plans: dict[Shape, Plan] = {}
        self._followed: dict[Shape, Plan] = {}  # those before the latest agreement
        self.agreed: Agreed | None = None
        self.pinned = False  # by the user, or by the checkpoint that the run goes on from
        self.records = False  # whether layers may be recorded as CUDA graphs
        self.meter: Meter | None = None
        self.stock: Stock | None = None
        self._model = weakref.ref(model)
        self._layers = [weakref.ref(site.module) for site, _ in sites]
        self._report = report
        self._reading = Reading(model, sites, options)
        self._forwards = 0
        self._urgent = False
        self._costs: dict[Shape, Costs] = {}
        left = sum(not fused for _, fused in sites)
        if left:
            report.notes.append(
                f"memory={options.memory!r}: {left} of {self.count} decoder layers are not patched as a whole; what "
                "they keep is the host's business, and the plan is for the others"
            )
        _check_weights(model, options)
        if options.memory_plan is not None:
            from fastplug.memory.saved_plans import load

            load(options.memory_plan).use(self, why="memory_plan names it")

    # --- asked by the layers, forward by forward ---

    def enter(self, index: int, layer: nn.Module, x: torch.Tensor) -> Policy:
        """The policy of a layer for the forward that begins now, with its input x [batch, length, hidden]."""
        shape = x.shape[0], padded_length(x.shape[1])
        if index == 0 or self.plan is None or (self.plan.batch, self.plan.sequence) != shape:
            self._begin(shape, layer, x)
        assert self.plan is not None
        assert self.stock is not None
        if index == self.count - 1:
            self.stock.look()
        return self.plan.policies[index]

    def observe(self, index: int) -> Observation | None:
        """Measure the layer whose forward begins now, if this is a forward to measure."""
        assert self.stock is not None
        assert self.plan is not None
        if not self.stock.calibration.watching:
            return None
        policy = self.plan.policies[index]
        return self.stock.calibration.observe(policy, self.estimate(self.plan)[index][policy])

    def estimate(self, plan: Plan) -> tuple[LayerCosts, ...]:
        """The costs that were reasoned for the shape of a plan."""
        return self._costs[plan.batch, plan.sequence]

    def held(self, index: int) -> int:
        """Bytes that dropping what the layer keeps would free, by the plan."""
        assert self.plan is not None
        policies = self.estimate(self.plan)[index].policies
        least = min(cost.saved for policy, cost in policies.items() if not policy.offloads or len(policies) == 1)
        return max(0, policies[self.plan.policies[index]].saved - least)

    @property
    def tile_rows(self) -> int | None:
        """Tokens that go through an MLP at once in layers that do not keep gate and up."""
        return None if self.plan is None else self.plan.tile_rows

    def pin(self, agreed: Agreed, plans: Sequence[Plan], why: str) -> None:
        """Follow these plans, and make those for other shapes of the same numbers."""
        self.agreed, self.pinned = agreed, True
        self.plans = {(plan.batch, plan.sequence): plan for plan in plans}
        self.plan = None
        self._report.notes.append(f"memory={self.options.memory!r}: trains by a saved plan, since {why}")

    def note(self, text: str) -> None:
        """Say once, in the log and in the report, why something is not planned."""
        text = f"memory={self.options.memory!r}: {text}"
        if text not in self._report.notes:
            self._report.notes.append(text)
            logger.warning("fastplug: %s", text)

    # --- planning ---

    def _begin(self, shape: Shape, layer: nn.Module, x: torch.Tensor) -> None:
        """The first layer's forward begins: a plan for this shape."""
        stock = self._start(x.device)
        self._forwards += 1
        stock.calibration.begin(shape)
        waiting = self.room.forwards(0)
        group = agreement.group_of(layer)
        if self.pinned and self._urgent:
            self.pinned = False
            self.note("the saved plan ran out of memory and is followed no more")
        due = agreement.due(self._forwards)
        if due and group is not None:
            self._agree_on_pins(x.device, group)
        urgent = group is None and (self._urgent or (self.agreed is not None and waiting >= self.agreed.live))
        if self.agreed is None or (not self.pinned and (due or urgent)):
            if self._urgent:
                self._forget_recordings()
            elif due:
                stock.lowered //= 2  # what was missing may be there again
            self._urgent = False
            agreed = of_all(stock.take(self.agreed, x, waiting, self._forwards), x.device, group)
            if self.agreed is None or agreed.differs(self.agreed):
                self.agreed = agreed
                if group is None:  # ranks may have seen other shapes, and are to make the same plan of the same one
                    self._followed.update(self.plans)
                self.plans.clear()
                self._release()  # blocks of the sizes that the last plans needed
        if due:
            self._limit(stock.meter)
        if shape not in self.plans:
            self.plans[shape] = self._make(shape)
        elif shape not in self._costs:  # a saved plan
            self._costs[shape] = dict(self._reading.estimates(*shape))[self.plans[shape].tile_rows].layers
        self.plan = plan = self.plans[shape]
        self.records = self.options.memory in FORCED or plan.total <= RECORDED * plan.budget
        stock.predicted = max(stock.predicted, plan.allocated)
        if plan.total >= TIGHT * plan.budget:
            stock.meter.expand()

    def _agree_on_pins(self, device: torch.device, group: Any) -> None:
        """Follow saved plans where all ranks have the same ones; every rank must call this."""
        mine = float(self.agreed.fingerprint) if self.pinned and self.agreed is not None else 0.0
        most, least = agreement.highest([mine, -mine], device, group)
        if most != -least and self.pinned:
            self.note(
                "another rank does not have the same saved plan, or ran out of memory by it, so new ones are made"
            )
        self.pinned = self.pinned and most == -least

    def _start(self, device: torch.device) -> Stock:
        """The books of the device that the layers run on, from the first forward on."""
        if self.stock is not None:
            return self.stock
        model = self._model()
        assert model is not None
        self.meter = self.meter or meter_for(device, model)
        if self.meter is None:
            self.off = f"fastplug cannot read the memory of {device.type} devices"
            raise OptionError(f"fastplug: memory={self.options.memory!r}: {self.off}; leave memory= out")
        self._reading.read(device)
        self._release()  # what loading and quantizing left in the cache
        trained = [p for p in model.parameters() if p.requires_grad]
        copies = self._reading.copies(device) if self.options.memory not in FORCED else 1.0
        self.stock = Stock(self.options, self.meter, self.room, trained, self._reading.optimizer_bytes(), copies)
        return self.stock

    def _limit(self, meter: Meter) -> None:
        """Hold the allocator to a budget that the user named."""
        asked = budget_of(self.options, meter.total())
        if asked is not None and self.agreed is not None:
            meter.limit(asked - self.agreed.context)

    def _make(self, shape: Shape) -> Plan:
        """The plan for a shape: a function of that, of what was agreed on, and of the plan before."""
        agreed = self.agreed
        assert agreed is not None
        fixed = {"model and optimizer": agreed.fixed + agreed.extra}
        forced = {"keep": Policy.KEEP, "full": Policy.RESIDUAL}.get(str(self.options.memory))
        found: list[tuple[Plan, Costs]] = []
        least: list[tuple[Plan, Costs]] = []
        errors: list[DoesNotFit] = []
        for rows, reasoned in self._reading.estimates(*shape):
            layers = agreed.apply(reasoned.layers)
            more: dict[str, Any] = {
                "head_peak": reasoned.head_peak,
                "accumulating": agreed.accumulating,
                "context": agreed.context,
                "slack": agreed.slack,
                "other_ms": reasoned.other_ms,
                "batch": shape[0],
                "sequence": shape[1],
            }

            def given(policies: list[Policy]) -> Plan:
                return assemble(layers, policies, fixed, agreed.available, **more)  # noqa: B023

            try:
                if forced is not None:
                    made = given([forced if forced in layer.policies else Policy.KEEP for layer in layers])
                else:
                    made = self._solve(layers, fixed, agreed, more)
            except DoesNotFit as error:
                errors.append(error)
                least.append((replace(given([_least(layer) for layer in layers]), tile_rows=rows), reasoned.layers))
                continue
            found.append((replace(made, tile_rows=rows), reasoned.layers))
            before = self._followed.get(shape)
            if forced is None and before is not None and before.tile_rows == rows and _possible(before, layers):
                same = replace(given(list(before.policies)), tile_rows=rows)
                if same.fits and same.host_bytes <= agreed.host and GAIN * same.ms <= made.ms:
                    found[-1] = same, reasoned.layers
            if forced is not None or set(made.policies) == {Policy.KEEP}:
                break
        if not found:
            nearest = min(errors, key=lambda failed: failed.least)
            if self._forwards == 1:
                raise nearest
            found = [min(least, key=lambda pair: pair[0].total)]
            why = str(nearest).removeprefix("fastplug: ")
            self.note(f"{why}; the step goes on with the least that layers can keep")
        plan, self._costs[shape] = min(found, key=lambda pair: in_comparison(pair[0]))
        return plan

    @staticmethod
    def _solve(layers: Costs, fixed: dict[str, int], agreed: Agreed, more: dict[str, Any]) -> Plan:
        """The fastest plan, with caution where there is room for it."""
        if agreed.caution:
            with contextlib.suppress(DoesNotFit):
                made = solve(layers, fixed, agreed.available - agreed.caution, host_budget=agreed.host, **more)
                return replace(made, budget=agreed.available)
        return solve(layers, fixed, agreed.available, host_budget=agreed.host, **more)

    # --- memory ran out ---

    def _ran_out(self, missing: int) -> None:
        """Plan less from the next forward on."""
        if self.agreed is None or self.stock is None:
            return
        self.stock.calibration.disturbed()
        self.stock.lowered += max(missing, self.agreed.available // 100)
        self._urgent = True
        self.note(
            f"a step ran out of memory at {gib(self.stock.meter.reserved())} reserved; what layers kept was dropped "
            "and computed again, and the next plans are smaller"
        )

    def _forget_recordings(self) -> None:
        for binding in self._bindings():
            binding.graphs = None

    def _bindings(self) -> list[Any]:
        """Of the layers that are there and patched."""
        layers = (reference() for reference in self._layers)
        return [layer.__dict__[KEY] for layer in layers if layer is not None and KEY in layer.__dict__]

    def _release(self) -> int:
        """Give cached blocks back to the device, and what waits there for copies; the bytes of the latter."""
        offloaders = {binding.runtime.offload for binding in self._bindings()} - {None}
        staged = sum(offloader.clear() for offloader in offloaders)
        if self.meter is not None:
            self.meter.release()
        return staged

    # --- around ---

    def close(self) -> None:
        """Give back the allocator's limit and settings."""
        if self.meter is not None:
            self.meter.restore()

    def describe(self) -> dict[str, Any]:
        """The plan for the report, as plain values."""
        found: dict[str, Any] = {"memory": self.options.memory, "why_no_plan": self.off}
        if self.plan is not None and self.agreed is not None and self.meter is not None:
            found.update(
                plan=self.plan.as_dict(),
                predicted_peak=self.plan.total,
                measured_peak=self.meter.peak()[1] + self.agreed.context if any(self.meter.peak()) else None,
                shapes=len(self.plans),
                dropped=self.room.dropped,
                pinned=self.pinned,
            )
        return found


def _possible(plan: Plan, layers: Costs) -> bool:
    """Whether the layers can have the policies that the plan gives them."""
    return all(policy in layer.policies for policy, layer in zip(plan.policies, layers, strict=True))


def _least(layer: LayerCosts) -> Policy:
    """The policy under which a layer keeps least on the device."""
    return min(layer.policies, key=lambda policy: layer[policy].saved)


def _check_weights(model: nn.Module, options: Options) -> None:
    """Raise ``OptionError`` if the weights alone are larger than the budget."""
    device = next(model.parameters()).device
    meter = None if device.type == "meta" else meter_for(device, model)
    asked = None if meter is None else budget_of(options, meter.total())
    if meter is None or asked is None:
        return
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()) if not t.is_meta)
    if weights + meter.context() > asked:
        raise OptionError(
            f"fastplug: memory={options.memory!r} is {gib(asked)}, and the weights of {type(model).__name__} alone "
            f"take {gib(weights)}, beside {gib(meter.context())} of the CUDA context; give a larger budget or load "
            "the weights in a smaller format"
        )


__all__ = ["Planner"]
