"""What one model plans from: budget, measurements, and a plan for each shape of a micro-batch."""

from __future__ import annotations

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
from fastplug.memory.budget import FORCED, amount, gib
from fastplug.memory.calibration import Agreed, Calibration, Observation
from fastplug.memory.costs import LayerCosts
from fastplug.memory.host_memory import RESERVE, available
from fastplug.memory.meter import Meter, meter_for
from fastplug.memory.oom import Room
from fastplug.memory.plan import Plan
from fastplug.memory.policy import Policy
from fastplug.memory.reading import Reading
from fastplug.memory.solve import DoesNotFit, assemble, solve
from fastplug.options import Options
from fastplug.patching.report import Report
from fastplug.patching.sites import Site

logger = logging.getLogger("fastplug")
AUTO_HEADROOM = 0.05  # of the device, left free by memory="auto" where the user names no headroom
CAUTION = 0.8  # of memory that proved not to be needed is planned with
YOUNG, GROWTH = 4, 96 * 2**20  # in the first forwards, kernels have yet to be loaded into the CUDA context
SLACK_STEP, SLACK_MOST = 0.02, 0.2  # more is left unplanned when the allocator keeps giving blocks back
Shape = tuple[int, int]  # batch, and length on the grid


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
        self.agreed: Agreed | None = None
        self.pinned = False  # by the user, or by the checkpoint that the run goes on from
        self.meter: Meter | None = None
        self._model = weakref.ref(model)
        self._report = report
        self._reading = Reading(model, sites, options)
        self._trained = [weakref.ref(p) for p in model.parameters() if p.requires_grad]
        self._calibration: Calibration | None = None
        self._forwards = 0
        self._urgent = False
        self._lowered = 0  # bytes by which plans are made smaller since memory ran out
        self._optimizer_seen = False
        self._assumed = 0  # bytes of the optimizer's states that are planned for and not there yet
        self._predicted_peak = 0  # of the plans since the last agreement
        self._peak_before = (0, 0)
        self._retries = 0
        self._costs: dict[Shape, tuple[LayerCosts, ...]] = {}
        self._fallback: tuple[Plan, tuple[LayerCosts, ...]] | None = None
        left = sum(not fused for _, fused in sites)
        if left:
            report.notes.append(
                f"memory={options.memory!r}: {left} of {self.count} decoder layers are not patched as a whole; what "
                "they keep is the host's business, and the plan is for the others"
            )
        self._check_weights(next(model.parameters()).device)
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
        return self.plan.policies[index]

    def observe(self, index: int) -> Observation | None:
        """Measure the layer whose forward begins now, if this is a forward to measure."""
        assert self._calibration is not None
        assert self.plan is not None
        if not self._calibration.watching:
            return None
        policy = self.plan.policies[index]
        return self._calibration.observe(policy, self.estimate(self.plan)[index][policy])

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
        meter = self._start(x.device)
        assert self._calibration is not None
        self._forwards += 1
        self._calibration.begin(shape)
        waiting = self.room.forwards(0)
        group = agreement.group_of(layer)
        if self.pinned and self._urgent:
            self.pinned = False
            self.note("the saved plan ran out of memory and is followed no more")
        urgent = group is None and (self._urgent or (self.agreed is not None and waiting >= self.agreed.live))
        if self.agreed is None or (not self.pinned and (agreement.due(self._forwards) or urgent)):
            self._renew(meter, x, waiting, group)
        if shape not in self.plans:
            self.plans[shape] = self._make(shape)
        elif shape not in self._costs:  # a saved plan
            self._costs[shape] = dict(self._reading.estimates(*shape))[self.plans[shape].tile_rows].layers
        plan = self.plans[shape]
        if plan is not self.plan:
            self.plan = plan
        self._predicted_peak = max(self._predicted_peak, plan.allocated)

    def _start(self, device: torch.device) -> Meter:
        """The meter of the device that the layers run on, from the first forward on."""
        if self.meter is None:
            model = self._model()
            assert model is not None
            self.meter = meter_for(device, model)
            if self.meter is None:
                self.off = f"fastplug cannot read the memory of {device}, so nothing is planned"
                self.note(self.off)
                raise OptionError(f"fastplug: memory={self.options.memory!r}: {self.off}; leave memory= out")
        if self._calibration is None:
            self._calibration = Calibration(self.meter)
            self._retries = self.meter.retries()
            self._reading.read(device)
            self.meter.release()  # what loading and quantizing left in the cache
        return self.meter

    def _renew(self, meter: Meter, x: torch.Tensor, waiting: int, group: Any) -> None:
        """Take the present numbers, those of the rank that has least; forget the plans if that changes much."""
        assert self._calibration is not None
        if not self._urgent:
            self._lowered //= 2  # what was missing may be there again
        self._urgent = False
        gradients = self._gradient_bytes()
        held = sum(record.held for record in self.room.records())
        fixed = meter.allocated() - gradients - x.numel() * x.element_size() - held
        extra = self._extra(meter)
        # A backward ran and its gradients are gone: an optimizer has stepped, and its states are allocated.
        self._optimizer_seen |= self.room.backwards > 0 and not gradients
        self._assumed = 0 if self._optimizer_seen else self._reading.optimizer_bytes()
        young = x.is_cuda and self._forwards < YOUNG
        local = Agreed(
            available=self._available(meter),
            context=meter.context() + (GROWTH if young else 0),
            fixed=max(fixed, 0) + self._assumed,
            extra=extra,
            slack=self._slack(meter),
            host=max(0, (available() or 0) - RESERVE),
            accumulating=gradients > 0 or (self.agreed is not None and self.agreed.accumulating),
            live=max(waiting + 1, 1 if self.agreed is None else self.agreed.live),
            ms=self._calibration.ms(),
            saved=self._calibration.saved(),
        )
        agreed = _of_all(local, x.device, group)
        self._predicted_peak = 0
        if self.agreed is None or agreed.differs(self.agreed):
            self.agreed = agreed
            self.plans.clear()
            meter.release()  # blocks of the sizes that the last plan needed
        if amount_of(self.options) is not None:
            meter.limit(amount_of(self.options, meter.total()) - agreed.context)  # type: ignore[operator]

    def _available(self, meter: Meter) -> int:
        """Bytes that a step may take, context included."""
        total = meter.total()
        now = meter.free() + meter.reserved() + meter.context()  # other processes left out
        headroom = self.options.headroom
        if self.options.memory in ("auto", *FORCED):
            left = AUTO_HEADROOM * total if headroom is None else amount(headroom).of(total)
            size = now - left
        else:
            asked = amount_of(self.options, total)
            assert asked is not None
            left = 0 if headroom is None else amount(headroom).of(total)
            size = min(asked - left, now)
        return int(size) - self._lowered

    def _extra(self, meter: Meter) -> int:
        """How far the highest mark was off the plans since the last agreement, where there is a new one."""
        peak = meter.peak()
        before, self._peak_before = self._peak_before, peak
        known = 0 if self.agreed is None else self.agreed.extra
        if self.agreed is None or peak[0] <= before[0] or not self._predicted_peak or before == (0, 0):
            return known
        found = peak[0] - (self._predicted_peak - self._assumed)
        return known + (found if found > 0 else int(found * CAUTION))

    def _slack(self, meter: Meter) -> float:
        known = Agreed.slack if self.agreed is None else self.agreed.slack
        retries, self._retries = meter.retries() - self._retries, meter.retries()
        return min(known + SLACK_STEP, SLACK_MOST) if self.agreed is not None and retries > 0 else known

    def _make(self, shape: Shape) -> Plan:
        """The plan for a shape: a function of that and of what was agreed on."""
        assert self.agreed is not None
        agreed = self.agreed
        fixed = {"model and optimizer": agreed.fixed + agreed.extra}
        forced = {"keep": Policy.KEEP, "full": Policy.RESIDUAL}.get(str(self.options.memory))
        best: tuple[Plan, tuple[LayerCosts, ...]] | None = None
        failed: DoesNotFit | None = None
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
            try:
                if forced is not None:
                    policies = [forced if forced in layer.policies else Policy.KEEP for layer in layers]
                    made = assemble(layers, policies, fixed, agreed.available, **more)
                else:
                    made = solve(layers, fixed, agreed.available, host_budget=agreed.host, **more)
            except DoesNotFit as error:
                failed = error if failed is None or error.least < failed.least else failed
                if self._forwards > 1 and best is None:  # a longer batch came: try with the least there is
                    least = [_least(layer) for layer in layers]
                    made = assemble(layers, least, fixed, agreed.available, **more)
                    if self._fallback is None or made.total < self._fallback[0].total:
                        self._fallback = replace(made, tile_rows=rows), reasoned.layers
                continue
            if best is None or made.ms < best[0].ms:
                best = replace(made, tile_rows=rows), reasoned.layers
            if forced is not None or set(made.policies) == {Policy.KEEP}:
                break
        if best is None:
            assert failed is not None
            if self._fallback is None:
                raise failed
            best, self._fallback = self._fallback, None
            self.note(f"{str(failed).removeprefix('fastplug: ')}; the step goes on with the least that layers can keep")
        self._costs[shape] = best[1]
        return best[0]

    # --- memory ran out ---

    def _ran_out(self, missing: int) -> None:
        """Plan less from the next forward on."""
        if self.agreed is None:
            return
        self._lowered += max(missing, self.agreed.available // 100)
        self._urgent = True
        self.note(
            f"a step ran out of memory at {gib(self.meter.reserved()) if self.meter else ''} reserved; "
            "what layers kept was dropped and computed again, and the next plans are smaller"
        )

    # --- around ---

    def _release(self) -> None:
        if self.meter is not None:
            self.meter.release()

    def _gradient_bytes(self) -> int:
        found = [p.grad for p in (reference() for reference in self._trained) if p is not None and p.grad is not None]
        return sum(grad.numel() * grad.element_size() for grad in found)

    def _check_weights(self, device: torch.device) -> None:
        """Raise ``OptionError`` if the weights alone are larger than the budget."""
        model = self._model()
        meter = None if model is None or device.type == "meta" else meter_for(device, model)
        if meter is None or model is None or amount_of(self.options) is None:
            return
        asked = amount_of(self.options, meter.total())
        weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()) if not t.is_meta)
        assert asked is not None
        if weights + meter.context() > asked:
            raise OptionError(
                f"fastplug: memory={self.options.memory!r} is {gib(asked)}, and the weights of {type(model).__name__} "
                f"alone take {gib(weights)}, beside {gib(meter.context())} of the CUDA context; give a larger budget "
                "or load the weights in a smaller format"
            )

    def close(self) -> None:
        """Give back the allocator's limit."""
        if self.meter is not None:
            self.meter.limit(None)

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


def amount_of(options: Options, total: int = 0) -> int | None:
    """The bytes that the user named as a budget, on a device of ``total`` bytes; None for "auto", "keep" and "full"."""
    return None if options.memory in ("auto", *FORCED) else amount(options.memory).of(total)


def _least(layer: LayerCosts) -> Policy:
    """The policy under which a layer keeps least on the device."""
    return min(layer.policies, key=lambda policy: layer[policy].saved)


def _of_all(local: Agreed, device: torch.device, group: Any) -> Agreed:
    """The numbers of the rank that has least room, which are the same on all ranks then."""
    if group is None:
        return local
    policies = list(Policy)
    values = [
        -local.available, local.context, local.fixed, local.extra, local.slack, -local.host, local.accumulating,
        local.live, *(local.ms.get(p, 0.0) for p in policies), *(local.saved.get(p, 0.0) for p in policies),
    ]  # fmt: skip
    found = agreement.highest([float(value) for value in values], device, group)
    ratios = found[8:]
    ms, saved = ratios[: len(policies)], ratios[len(policies) :]
    return Agreed(
        available=int(-found[0]),
        context=int(found[1]),
        fixed=int(found[2]),
        extra=int(found[3]),
        slack=found[4],
        host=int(-found[5]),
        accumulating=bool(found[6]),
        live=int(found[7]),
        ms={p: ratio for p, ratio in zip(policies, ms) if ratio},
        saved={p: ratio for p, ratio in zip(policies, saved) if ratio},
    )


__all__ = ["Planner", "amount_of"]
