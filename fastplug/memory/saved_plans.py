"""Plans as a file beside a checkpoint, so that a run that goes on trains by the plans it began with.

The file holds the numbers that plans follow from (``Agreed``) and the plans made of them so far. A run that takes it up
uses these plans, makes plans for new shapes of the same numbers, and measures nothing anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fastplug.errors import OptionError
from fastplug.memory.calibration import Agreed
from fastplug.memory.plan import Plan
from fastplug.memory.policy import Policy

if TYPE_CHECKING:
    from fastplug.memory.planner import Planner

FILE = "fastplug_memory_plan.json"
VERSION = 1


@dataclass(frozen=True)
class SavedPlans:
    """What one model was trained by.

    Attributes:
        memory, headroom: The options that the plans were made for.
        agreed: The numbers that they follow from.
        plans: One for each shape so far.
    """

    memory: str | float | None
    headroom: str | float | None
    agreed: Agreed
    plans: tuple[Plan, ...]

    @property
    def layers(self) -> int:
        return len(self.plans[0].policies) if self.plans else 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        agreed = asdict(self.agreed)
        for name in ("ms", "saved"):
            agreed[name] = {policy.value: ratio for policy, ratio in agreed[name].items()}
        return {
            "version": VERSION,
            "memory": self.memory,
            "headroom": self.headroom,
            "agreed": agreed,
            "plans": [plan.as_dict() for plan in self.plans],
        }

    @classmethod
    def of_dict(cls, values: Any) -> SavedPlans:
        """What :meth:`as_dict` gave.

        Raises:
            OptionError: It is something else, or of another version.
        """
        try:
            if values["version"] != VERSION:
                raise OptionError(
                    f"fastplug: these memory plans are of version {values['version']}, known is {VERSION}: leave "
                    "memory_plan out, and they are made anew"
                )
            agreed = dict(values["agreed"])
            for name in ("ms", "saved"):
                agreed[name] = {Policy(policy): float(ratio) for policy, ratio in agreed[name].items()}
            plans = []
            for plan in values["plans"]:
                plans.append(Plan(**{**plan, "policies": tuple(Policy(policy) for policy in plan["policies"])}))
            if len({len(plan.policies) for plan in plans}) != 1:
                raise ValueError("it has no plan, or plans for different models")
            return cls(values["memory"], values["headroom"], Agreed(**agreed), tuple(plans))
        except OptionError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OptionError(f"fastplug: these are not memory plans that fastplug saved: {error!r}") from error

    def use(self, planner: Planner, why: str) -> None:
        """Let a planner follow these plans.

        Raises:
            OptionError: They are for a model with another number of layers.
        """
        if self.layers != planner.count:
            raise OptionError(
                f"fastplug: the memory plan is for {self.layers} decoder layers, the model has {planner.count}: it was "
                "made for another model"
            )
        planner.pin(self.agreed, self.plans, why)


def saved_plans(planner: Planner) -> SavedPlans | None:
    """What a planner has decided so far, or None before its first step."""
    if planner.agreed is None or not planner.plans:
        return None
    options = planner.options
    return SavedPlans(options.memory, options.headroom, planner.agreed, tuple(planner.plans.values()))


def state(model: nn.Module) -> list[dict[str, Any]]:
    """The plans of a patched model as plain values: one entry for each language model in it that has trained."""
    from fastplug.memory.runtime import planners

    found = (saved_plans(planner) for planner in planners(model))
    return [saved.as_dict() for saved in found if saved is not None]


def restore(model: nn.Module, values: Any, why: str = "the checkpoint was trained by it") -> str | None:
    """Go on with the plans of :func:`state`; a reason where they do not fit this run, which then plans anew.

    A plan that the user pins by the option ``memory_plan`` is not replaced.
    """
    from fastplug.memory.runtime import planners

    found = planners(model)
    if not found or not values:
        return None
    try:
        saved = [SavedPlans.of_dict(value) for value in values]
    except OptionError as error:
        return f"the saved memory plans are not used: {str(error).removeprefix('fastplug: ')}"
    if [one.layers for one in saved] != [planner.count for planner in found]:
        return "the saved memory plans are for another model and are not used"
    for one, planner in zip(saved, found):
        options = planner.options
        if (one.memory, one.headroom) != (options.memory, options.headroom):
            return (
                f"the saved memory plans were made for memory={one.memory!r}, headroom={one.headroom!r}; new ones are "
                f"made for memory={options.memory!r}, headroom={options.headroom!r}"
            )
    for one, planner in zip(saved, found):
        if planner.options.memory_plan is None:
            one.use(planner, why)
    return None


def save(model: nn.Module, folder: str | Path) -> Path | None:
    """Write the plans of a patched model into a folder, say that of a checkpoint; None where there are none yet."""
    values = state(model)
    if not values:
        return None
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return path


def read(path: str | Path) -> list[Mapping[str, Any]]:
    """The plans in a file, or in the folder of a checkpoint, as :func:`restore` takes them.

    Raises:
        OptionError: There is no such file, or it is none of fastplug's.
    """
    where = Path(path)
    where = where / FILE if where.is_dir() else where
    try:
        values = json.loads(where.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"fastplug: there is no memory plan at {where} ({error.strerror})") from error
    except ValueError as error:
        raise OptionError(f"fastplug: {where} is not a memory plan that fastplug saved: {error}") from error
    return values if isinstance(values, list) else [values]


def load(path: str | Path, index: int = 0) -> SavedPlans:
    """The plans of one language model in a file.

    Raises:
        OptionError: There is no such file, or it has no such plan.
    """
    values = read(path)
    if index >= len(values):
        raise OptionError(f"fastplug: {path} has memory plans for {len(values)} models only")
    return SavedPlans.of_dict(values[index])


__all__ = ["FILE", "SavedPlans", "load", "read", "restore", "save", "saved_plans", "state"]
