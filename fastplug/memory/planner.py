"""What one model plans from: a plan for each shape of a micro-batch, out of numbers that are renewed now and then."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastplug.errors import OptionError
from fastplug.graphs.replay import padded_length
from fastplug.memory import agreement
from fastplug.memory.budget import FORCED, gib
from fastplug.memory.calibration import Agreed, Observation
from fastplug.memory.costs import LayerCosts
from fastplug.memory.decoded import DecodedWeights
from fastplug.memory.making import Maker
from fastplug.memory.meter import Meter, meter_for
from fastplug.memory.moments import may_hand_on
from fastplug.memory.oom import Room
from fastplug.memory.plan import Plan, Shape
from fastplug.memory.policy import Policy
from fastplug.memory.reading import Reading
from fastplug.memory.recordings import Recordings, possible
from fastplug.memory.states import Optimizers
from fastplug.memory.stock import Stock, budget_of, check_weights, of_all, weight_bytes
from fastplug.options import Options
from fastplug.patching.report import Report
from fastplug.patching.sites import KEY, Site

logger = logging.getLogger("fastplug")
GROWN = 1.01  # of what the plan before allocated, from which on its blocks are in the way
TIGHT = 0.9  # of its budget that a plan needs for scattered free memory to matter
COMPILED = (
    "under torch.compile nothing is planned and no budget is kept to, since the compiler decides itself what layers "
    "keep; the host's gradient checkpointing is an order again. Train without torch.compile (torch_compile=False) to "
    "have a plan, or leave memory= out"
)
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
        self.compiled = False  # layers ran under torch.compile
        self.room = Room(self._release, self._ran_out, self.spare)
        self.plan: Plan | None = None
        self.plans: dict[Shape, Plan] = {}
        self._followed: dict[Shape, Plan] = {}  # those before the latest agreement
        self.agreed: Agreed | None = None
        self.pinned = False  # by the user, or by the checkpoint that the run goes on from
        self.records = False  # whether layers may be recorded as CUDA graphs
        self.recordings = Recordings(self._by_layer)
        self._others: dict[Shape, Plan | None] = {}  # without copies, to compare plans with
        self._beside: dict[Shape, int] = {}  # bytes that recordings of other shapes held when a plan was made
        self._decoded = DecodedWeights()
        self._left: dict[Shape, tuple[Plan, int]] = {}  # see _leaving
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
        check_weights(model, options)
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
        self._decoded.enter(index)
        return self.plan.policies[index]

    def spare(self) -> int:
        """Let go of what is only kept because there was room, until the next training step; the bytes of it."""
        return self._decoded.spare()

    def observe(self, index: int) -> Observation | None:
        """Measure the layer whose forward begins now, if this is a forward to measure."""
        assert self.stock is not None
        assert self.plan is not None
        if not self.stock.calibration.watching or self.records:  # to record, and to replay, is another matter
            return None
        policy = self.plan.policies[index]
        return self.stock.calibration.observe(policy, self.estimate(self.plan)[index][policy], self._aside)

    def _aside(self) -> int:
        """Bytes that are allocated now and come and go beside what a layer keeps."""
        return self._decoded.size() + sum(offloader.staged for offloader in self._offloaders())

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
        stock.begin(shape)
        waiting, renewed, urgent = self.room.forwards(0), False, self._urgent
        group = agreement.group_of(layer)
        if self.pinned and self._urgent:
            self.pinned = False
            self.note("the saved plan ran out of memory and is followed no more")
        due = agreement.due(self._forwards)
        if due and group is not None:
            self._agree_on_pins(x.device, group)
        news = stock.stepped() and self.agreed is not None and self.agreed.assumed > 0
        news |= self._urgent or (self.agreed is not None and waiting >= self.agreed.live)
        if self.agreed is None or (not self.pinned and (due or (news and group is None))):
            renewed = self._take_stock(stock, x, waiting, group, due)
        if due:
            self._limit(stock.meter)
        before = self._followed.get(shape)
        plan = self._plan_for(shape, alone=group is None)
        less = before is not None and before.alike(plan) and plan.allocated <= GROWN * before.allocated
        if renewed and (urgent or not less):
            self._release()  # blocks of the sizes that the last plans needed; to get them again takes most of a second
        self._follow(stock, plan)

    def _take_stock(self, stock: Stock, x: torch.Tensor, waiting: int, group: Any, due: bool) -> bool:
        """Agree on the present numbers; whether plans are to be made anew of them."""
        if self._urgent:
            self.recordings.forget()
            stock.lower(0 if self.plan is None else self.plan.total)
        elif due:
            stock.lowered //= 2  # what was missing may be there again
        self._urgent = False
        held = sum(self.recordings.held().values()) + self._decoded.size()
        rates = [rate for rate in (offloader.rate() for offloader in self._offloaders()) if rate is not None]
        stock.copy = self._reading.copy_ratio(min(rates)) if rates else stock.copy
        local = stock.take(self.agreed, x, waiting, self._forwards, self._pinned_bytes(), held)
        self._reading.in_backward = stock.states.in_backward
        agreed = of_all(local, x.device, group)
        if self.agreed is not None and not agreed.differs(self.agreed):
            return False
        self.agreed = agreed
        self._followed.update(self.plans)
        self.plans.clear()
        self._others.clear()
        return True

    def _follow(self, stock: Stock, plan: Plan) -> None:
        """The present forward follows this plan, or one without copies to compare it with."""
        compares = plan.host_bytes > 0 and stock.calibration.compares() and not self.pinned
        other = self._without_copies(plan) if compares else None
        self.plan = plan = other or plan
        stock.calibration.follow(plan, instead=other is not None)
        tells = stock.calibration.watching or agreement.due(self._forwards + 1)
        for offloader in self._offloaders():
            offloader.timing = tells or offloader.rate() is None
        self._decoded.follow(plan, self._leaving(plan))
        stock.predicted = max(stock.predicted, plan.allocated)
        if plan.total >= TIGHT * plan.budget:
            stock.meter.expand()

    def _plan_for(self, shape: Shape, alone: bool) -> Plan:
        """The plan for a shape, made anew where the numbers it was made of have changed."""
        agreed = self.agreed
        assert agreed is not None
        held = self.recordings.held()
        beside = sum(size for other, size in held.items() if other != shape)
        known = self.plans.get(shape)
        if known is None or (not self.pinned and beside != self._beside.get(shape, 0)) or shape not in self._costs:
            # Ranks may have seen other shapes, and are to make the same plan of the same one.
            before = self._followed.get(shape) if alone else None
            maker = Maker(self._reading, agreed, shape, self.options.memory, before, beside, self.recordings.possible)
            made = maker.make(first=self._forwards == 1) if known is None or not self.pinned else maker.follow(known)
            if held and not made.plan.fits and self.options.memory not in FORCED:
                self._give_up_recordings()
                return self._plan_for(shape, alone)
            if made.note is not None:
                self.note(made.note)
            past = self._followed.get(shape)
            if shape in held and (not made.recorded or past is None or not past.alike(made.plan)):
                self.recordings.forget()
            self.plans[shape], self._costs[shape] = made.plan, made.reasoned
            self._beside[shape], self._followed[shape] = beside, made.plan
            self.recordings.plan(shape, made.reasoned if made.recorded else None)
        self.records = self.options.memory in FORCED or shape in self.recordings.costs
        if self.recordings.begins(shape, held):
            self._release()  # what was left in the allocator's cache, which a recording cannot use
        return self.plans[shape]

    def _leaving(self, plan: Plan) -> int:
        """How many layers, from the first on, may leave decoded weights to the next forward under a plan."""
        assert self.agreed is not None
        if self.options.memory in FORCED:
            return self.count
        if self._reading.cut_up(plan):
            return 0
        shape = plan.batch, plan.sequence
        known, count = self._left.get(shape, (None, 0))
        if known is not plan:
            layers, handed = self.agreed.apply(self.estimate(plan)), self._reading.handed(plan)
            accumulating = self.agreed.accumulating
            count = may_hand_on(layers, plan.policies, handed, head_peak=plan.logits, accumulating=accumulating)
            self._left[shape] = plan, count
        return count

    def _without_copies(self, plan: Plan) -> Plan | None:
        """A plan of the same numbers to compare one with that copies to the host's memory."""
        assert self.agreed is not None
        shape = plan.batch, plan.sequence
        if shape not in self._others:
            maker = Maker(self._reading, self.agreed, shape, self.options.memory, None, self._beside.get(shape, 0))
            self._others[shape] = maker.without_copies(plan)
        return self._others[shape]

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
        size, optimizers = weight_bytes(model, device), Optimizers(trained, device)
        self.stock = Stock(self.options, self.meter, self.room, trained, optimizers, size, copies)
        self.recordings.possible = possible(self.options.graphs, device)
        weights = {binding.runtime.weights for binding in self._bindings()} - {None}
        self._decoded = DecodedWeights(weights, counted=device.type == "cuda")
        return self.stock

    def _limit(self, meter: Meter) -> None:
        """Hold the allocator to a budget that the user named."""
        asked = budget_of(self.options, meter.total())
        if asked is not None and self.agreed is not None:
            meter.limit(asked - self.agreed.context)

    # --- memory ran out ---

    def _ran_out(self, missing: int) -> None:
        """Plan less from the next forward on."""
        if self.agreed is None or self.stock is None:
            return
        self.stock.calibration.disturbed()
        self.stock.short += max(missing, self.agreed.available // 100)
        self._urgent = True
        self.note(
            f"a step ran out of memory at {gib(self.stock.meter.reserved())} reserved; what layers kept was dropped "
            "and computed again, and the next plans are smaller"
        )

    def _give_up_recordings(self) -> None:
        """For good: batches of two kinds would else take each other's memory in turn."""
        self.note("layers are not replayed as CUDA graphs any more: other batches need what recordings hold")
        if not self.pinned:
            self.plans = {shape: plan for shape, plan in self.plans.items() if shape not in self.recordings.costs}
        self.recordings.give_up()

    def _by_layer(self) -> list[Any]:
        """The layers' bindings in order, None for a layer without one."""
        layers = (reference() for reference in self._layers)
        return [None if layer is None else layer.__dict__.get(KEY) for layer in layers]

    def _bindings(self) -> list[Any]:
        """Of the layers that are there and patched."""
        return [binding for binding in self._by_layer() if binding is not None]

    def _offloaders(self) -> set[Any]:
        return {binding.runtime.offload for binding in self._bindings()} - {None}

    def _pinned_bytes(self) -> int:
        """Bytes of host memory that are held for offloading."""
        return sum(offloader.host_bytes for offloader in self._offloaders())

    def _release(self) -> int:
        """Give cached blocks back to the device, and what waits there for copies; the bytes of the latter."""
        staged = sum(offloader.clear() for offloader in self._offloaders())
        if self.meter is not None:
            self.meter.release()
        return staged

    # --- around ---

    def trace(self) -> None:
        """Say that layers run under torch.compile, which calls this while it traces them, and not when they run."""
        self.compiled = True
        self.note(COMPILED)

    trace._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as torch.compiler.assume_constant_result does

    def close(self) -> None:
        """Give back the allocator's limit and settings."""
        if self.meter is not None:
            self.meter.restore()

    def describe(self) -> dict[str, Any]:
        """The plan for the report, as plain values."""
        why = COMPILED if self.compiled and self.plan is None else self.off
        found: dict[str, Any] = {"memory": self.options.memory, "why_no_plan": why}
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


__all__ = ["Planner"]
