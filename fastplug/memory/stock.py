"""Taking stock: the numbers of this rank that a plan follows from, as they are when a forward begins."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import nn

from fastplug.errors import OptionError
from fastplug.memory import agreement
from fastplug.memory.budget import FORCED, amount, gib
from fastplug.memory.calibration import Agreed, Calibration
from fastplug.memory.host_memory import RESERVE
from fastplug.memory.host_memory import available as host_available
from fastplug.memory.meter import Meter, local_bytes, meter_for
from fastplug.memory.oom import Room
from fastplug.memory.plan import Shape
from fastplug.memory.policy import Policy
from fastplug.memory.states import Optimizers, States
from fastplug.options import Options
from fastplug.sharding import distributed

AUTO_HEADROOM = 0.05  # of the device, left free by memory="auto" where the user names no headroom
HOST_SHARE = 0.8  # of the host's free memory that all ranks may pin: data loaders and checkpoints need some too
CAUTION = 0.8  # of memory that proved not to be needed is planned with
YOUNG, GROWTH = 4, 96 * 2**20  # in the first forwards, kernels have yet to be loaded into the CUDA context
YOUNG_SHARE = 0.05  # of a budget that is left unused meanwhile
SLACK_STEP, SLACK_MOST = 0.02, 0.2  # more is left unplanned when the allocator keeps giving blocks back


class Stock:
    """What one rank has.

    Args:
        options: With ``memory`` set.
        meter: The device's memory.
        room: What waits for its backward.
        trained: The parameters that get gradients.
        optimizers: What trains them.
        weights: Bytes of weights and buffers that this rank has on the device.
        copy: Measured over assumed milliseconds of copies to the host's memory.

    Attributes:
        copy: Likewise, as it is now.
    """

    def __init__(
        self,
        options: Options,
        meter: Meter,
        room: Room,
        trained: Iterable[nn.Parameter],
        optimizers: Optimizers,
        weights: int,
        copy: float = 1.0,
    ) -> None:
        self.options, self.meter, self.room, self.weights, self.copy = options, meter, room, weights, copy
        self.calibration = Calibration(meter)
        self.lowered = 0  # bytes by which plans are made smaller since memory ran out
        self.short = 0  # bytes that were missing when it did, since stock was taken last
        self.predicted = 0  # the highest allocation that the plans since the last agreement foretold
        self._trained = [weakref.ref(p) for p in trained]
        self._optimizers = optimizers
        self.states = States(0, certain=False)  # of these, as they were before the first step
        self._stepped = False  # some optimizer has, so its states are allocated
        self._to_come = 0  # bytes of the optimizer's states that are planned for and not there yet
        self._peak_before = (0, 0)
        self._seen = 0  # the most that was allocated at a moment when it was looked at, since the last agreement
        self._retries = meter.retries()
        self._tight = False  # whether the allocator gave blocks back in a settled step since the last agreement

    def take(
        self, known: Agreed | None, x: torch.Tensor, waiting: int, forwards: int, pinned: int = 0, recorded: int = 0
    ) -> Agreed:
        """The present numbers.

        Args:
            known: Those that were agreed on last.
            x: The input of the first layer, whose forward begins.
            waiting: How many forwards wait for their backward.
            forwards: How many there were, this one included.
            pinned: Bytes of host memory that this rank has pinned for offloading.
            recorded: Bytes that recorded layers hold, whether or not they run.
        """
        meter = self.meter
        gradients = self._gradients()
        held = sum(record.held for record in self.room.records())
        fixed = max(meter.allocated() - gradients - x.numel() * x.element_size() - held - recorded, 0)
        extra = self._extra(known)
        if not self._stepped:
            self.states = self._optimizers.states()
        self._to_come = 0 if self._stepped else self.states.missing
        self.predicted = 0
        young = x.is_cuda and forwards < YOUNG
        available = self._available() - self.lowered
        return Agreed(
            available=available,
            context=meter.context() + (GROWTH if young else 0),
            fixed=fixed + self._to_come,
            extra=extra,
            slack=self._slack(known),
            weights=self.weights,
            host=self._host(pinned),
            accumulating=gradients > 0 or (known is not None and known.accumulating),
            live=max(waiting + 1, 1 if known is None else known.live),
            copy=self.copy,
            copies=not self.calibration.steps.slower_with_copies(),
            caution=int(YOUNG_SHARE * available) if young and not self.lowered else 0,
            assumed=0 if self.states.certain else self._to_come,
            ms=self.calibration.ms(),
            saved=self.calibration.saved(),
        )

    def lower(self, planned: int) -> None:
        """Make the next plans smaller by what was missing under one of ``planned`` bytes.

        What others have taken meanwhile was missing, too. It is not available any more, so it is not counted again.
        """
        available = self._available()
        gone = max(0, planned - available)
        self.lowered += max(self.short - gone, available // 100)
        self.short = 0

    def stepped(self) -> bool:
        """Whether an optimizer has stepped since the last time that this was asked, and had not before.

        A backward ran and its gradients are gone. To be asked at every forward: where gradients of several
        micro-batches add up, there are some at most of them.
        """
        before = self._stepped
        self._stepped = before or (self.room.backwards > 0 and not self._gradients())
        return self._stepped is not before

    @staticmethod
    def _host(pinned: int) -> int:
        """Bytes that this rank may pin, those that it has pinned included. All ranks of a host share what is free."""
        free = host_available()
        if free is None:
            return pinned
        ranks = agreement.ranks_here()  # which have pinned as much as this one: they follow one plan
        return max(0, int(HOST_SHARE * (free / ranks + pinned) - RESERVE / ranks))

    def _available(self) -> int:
        """Bytes that a step may take, context included."""
        total = self.meter.total()
        now = self.meter.free() + self.meter.reserved() + self.meter.context()  # what others have left out
        headroom, asked = self.options.headroom, budget_of(self.options, total)
        left = 0 if headroom is None else amount(headroom).of(total)
        if asked is not None:
            return min(asked - left, now)
        return now - (int(AUTO_HEADROOM * total) if headroom is None else left)

    def look(self) -> None:
        """Note how much is allocated: to be called where a step holds much."""
        self._seen = max(self._seen, self.meter.allocated())

    def _extra(self, known: Agreed | None) -> int:
        """How far the highest mark was off the plans since the last agreement, where there is a new one.

        A mark below what was seen says that the host resets these counters, as some do at every step to log them.
        """
        peak = self.meter.peak()
        before, self._peak_before = self._peak_before, peak
        seen, self._seen = self._seen, 0
        so_far = 0 if known is None else known.extra
        if known is None or peak[0] <= before[0] or peak[0] < seen or not self.predicted or before == (0, 0):
            return so_far
        found = peak[0] - (self.predicted - self._to_come)
        return so_far + (found if found > 0 else int(found * CAUTION))

    def begin(self, shape: Shape) -> None:
        """A forward of this shape begins."""
        settled = self.calibration.begin(shape)  # the step before; a new plan's blocks have to be found first
        before, self._retries = self._retries, self.meter.retries()
        self._tight |= settled and self._retries > before

    def _slack(self, known: Agreed | None) -> float:
        so_far = Agreed.slack if known is None else known.slack
        tight, self._tight = self._tight, False
        return min(so_far + SLACK_STEP, SLACK_MOST) if known is not None and tight else so_far

    def _gradients(self) -> int:
        found = [p.grad for p in (reference() for reference in self._trained) if p is not None and p.grad is not None]
        return sum(local_bytes(grad) for grad in found)


def budget_of(options: Options, total: int) -> int | None:
    """The bytes that the user named, on a device of ``total`` bytes; None for "auto", "keep" and "full"."""
    return None if options.memory in ("auto", *FORCED) else amount(options.memory).of(total)


def weight_bytes(model: nn.Module, device: torch.device | None = None) -> int:
    """Bytes of a model's weights and buffers, on devices of this kind alone if one is given."""
    found = (t for t in (*model.parameters(), *model.buffers()) if not t.is_meta)
    return sum(local_bytes(t) for t in found if device is None or t.device.type == device.type)


def check_weights(model: nn.Module, options: Options) -> None:
    """Raise ``OptionError`` if the weights alone are larger than the budget."""
    device = next(model.parameters()).device
    meter = None if _will_move(model, device) else meter_for(device, model)
    asked = None if meter is None else budget_of(options, meter.total())
    if meter is None or asked is None:
        return
    weights = weight_bytes(model)
    if weights + meter.context() > asked:
        beside = f", beside {gib(meter.context())} of the CUDA context" if meter.context() else ""
        raise OptionError(
            f"fastplug: memory={options.memory!r} is {gib(asked)}, and the weights of {type(model).__name__} alone "
            f"take {gib(weights)}{beside}; give a larger budget or load the weights in a smaller format"
        )


def _will_move(model: nn.Module, device: torch.device) -> bool:
    """Whether the host may still shard the weights, or move them to a GPU: then the first step finds out how much of
    them is where. Hosts apply early, the Trainer in its constructor."""
    if device.type == "meta" or (device.type == "cpu" and torch.cuda.is_available()):
        return True
    dist = torch.distributed
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return several and not any(distributed(parameter) for parameter in model.parameters())


def of_all(local: Agreed, device: torch.device, group: object) -> Agreed:
    """The numbers of the rank that has least room, which are the same on all ranks of the group then."""
    if group is None:
        return local
    policies = list(Policy)
    values = [
        -local.available, local.context, local.fixed, local.extra, local.slack, -local.host, local.accumulating,
        local.live, local.copy, local.caution, local.assumed, not local.copies, -local.weights,
        *(local.ms.get(p, 0.0) for p in policies), *(local.saved.get(p, 0.0) for p in policies),
    ]  # fmt: skip
    found = agreement.highest([float(value) for value in values], device, group)
    ms, saved = found[13 : 13 + len(policies)], found[13 + len(policies) :]
    return Agreed(
        available=int(-found[0]),
        context=int(found[1]),
        fixed=int(found[2]),
        extra=int(found[3]),
        slack=found[4],
        host=int(-found[5]),
        accumulating=bool(found[6]),
        live=int(found[7]),
        copy=found[8],
        caution=int(found[9]),
        assumed=int(found[10]),
        copies=not found[11],
        weights=int(-found[12]),
        ms={p: ratio for p, ratio in zip(policies, ms) if ratio},
        saved={p: ratio for p, ratio in zip(policies, saved) if ratio},
    )


__all__ = ["Stock", "budget_of", "check_weights", "of_all", "weight_bytes"]
