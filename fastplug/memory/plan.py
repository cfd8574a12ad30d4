"""A plan: what each layer keeps in one step of a given shape, and what that is predicted to need."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastplug.errors import OptionError
from fastplug.memory.policy import Policy

if TYPE_CHECKING:
    from rich.table import Table

VERSION = 1
OUTSIDE = ("slack", "context")  # parts that PyTorch does not count as allocated
DECODED = "decoded weights"  # the part of those that stay from step to step
Shape = tuple[int, int]  # of a micro-batch: batch, and length on the grid


@dataclass(frozen=True)
class Plan:
    """The policies of the layers for one shape, with the prediction that they rest on.

    Attributes:
        policies: One per decoder layer, in the order of the forward.
        batch, sequence: The shape of a micro-batch.
        budget: Bytes of reserved memory plus the CUDA context that the plan was made for.
        parts: Name -> bytes at the moment of the peak. ``slack`` is reserved and not allocated, ``context`` is the
            CUDA context; the other parts add up to what PyTorch calls allocated.
        ms: Predicted milliseconds of a micro-batch.
        host_bytes: Pinned host memory.
        moment: When the peak is.
        tile_rows: Tokens that go through an MLP at once in layers that do not keep gate and up, or None for all.
        logits: Bytes of head and loss at their own moment, whether or not that is the highest.
        model, gpu: For the reader.
    """

    policies: tuple[Policy, ...]
    batch: int
    sequence: int
    budget: int
    parts: Mapping[str, int]
    ms: float
    host_bytes: int = 0
    moment: str = ""
    tile_rows: int | None = None
    logits: int = 0
    model: str = ""
    gpu: str = ""

    @property
    def total(self) -> int:
        """Bytes of reserved memory plus the CUDA context at the peak: what the budget is compared with."""
        return sum(self.parts.values())

    @property
    def reserved(self) -> int:
        """Bytes that PyTorch's allocator holds at the peak (``torch.cuda.max_memory_reserved``)."""
        return self.total - self.parts.get("context", 0)

    @property
    def allocated(self) -> int:
        """Bytes in tensors at the peak (``torch.cuda.max_memory_allocated``)."""
        return sum(size for name, size in self.parts.items() if name not in OUTSIDE)

    @property
    def fits(self) -> bool:
        """Whether the prediction is within the budget."""
        return self.total <= self.budget

    def alike(self, other: Plan) -> bool:
        """Whether layers compute and keep the same under both."""
        return (self.policies, self.tile_rows) == (other.policies, other.tile_rows)

    def counts(self) -> dict[Policy, int]:
        """How many layers have each policy, in the order of :class:`Policy`; those that none has are left out."""
        return {policy: self.policies.count(policy) for policy in Policy if policy in self.policies}

    def places(self) -> list[tuple[str, Policy]]:
        """("layers 0 to 9", policy) of the layers that have each policy, in the order of their first layers.

        Layers at equal distances are "every 3rd of layers 0 to 27". Of policies whose layers lie in no such way, the
        one that most layers have is that of "the others".
        """
        layers = {p: [i for i, other in enumerate(self.policies) if other is p] for p in dict.fromkeys(self.policies)}
        named = {policy: _regular(indices) for policy, indices in layers.items()}
        scattered = [policy for policy, name in named.items() if name is None]
        others = max(scattered, key=lambda policy: len(layers[policy]), default=None)
        return [
            (name or ("the others" if policy is others else f"layers {_listed(layers[policy])}"), policy)
            for policy, name in named.items()
        ]

    def to_json(self) -> str:
        """The plan as JSON text, which :meth:`from_json` reads."""
        return json.dumps({"version": VERSION, **self.as_dict()}, indent=1)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "model": self.model,
            "gpu": self.gpu,
            "batch": self.batch,
            "sequence": self.sequence,
            "budget": self.budget,
            "policies": [policy.value for policy in self.policies],
            "parts": dict(self.parts),
            "ms": self.ms,
            "host_bytes": self.host_bytes,
            "moment": self.moment,
            "tile_rows": self.tile_rows,
            "logits": self.logits,
        }

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that :meth:`to_json` wrote.

        Raises:
            OptionError: It is not one, or of another version.
        """
        try:
            values = json.loads(text)
            version = values.pop("version")
            if version != VERSION:
                raise OptionError(
                    f"fastplug: this is a plan of version {version}, known is {VERSION}: let it be made anew"
                )
            values["policies"] = tuple(Policy(value) for value in values["policies"])
            return cls(**values)
        except OptionError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OptionError(f"fastplug: this is not a plan that fastplug wrote: {error}") from error

    def table(self) -> Table:
        """The parts, the layers' policies and the prediction as a table of rich."""
        from fastplug.memory.showing import plan_table

        return plan_table(self)

    def __rich__(self) -> Table:
        return self.table()

    def picture(self, path: str | Path) -> Path:
        """Draw the parts as one stacked bar and save it; the ending of ``path`` names the format. Needs matplotlib.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        from fastplug.memory.showing import draw

        return draw({"plan": self}, path)

    def __str__(self) -> str:
        what = ", ".join(f"{count} {policy.value}" for policy, count in self.counts().items())
        need = f"{self.total / 2**30:.2f} GiB of {self.budget / 2**30:.2f}"
        return f"{self.batch} x {self.sequence}: {need}, {self.ms:.0f} ms ({what})"


def _regular(layers: Sequence[int]) -> str | None:
    """What to call layers at equal distances, or None."""
    first, last = layers[0], layers[-1]
    steps = {after - before for before, after in itertools.pairwise(layers)}
    if not steps:
        return f"layer {first}"
    if len(steps) > 1:
        return None
    (step,) = steps
    ordinal = str(step) + {2: "nd", 3: "rd"}.get(step, "th")
    return f"layers {first} to {last}" if step == 1 else f"every {ordinal} of layers {first} to {last}"


def _listed(layers: Sequence[int]) -> str:
    """As in "1, 3 to 5, 9"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
