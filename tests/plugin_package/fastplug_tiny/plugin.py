"""What the package tells fastplug: a row for its model, an op of its own, an exporter, one decision, and two notes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fastplug import hookimpl
from fastplug.exporters import Exporter, ExportResult
from fastplug.families import Family
from fastplug.ops.rms_norm import reference
from fastplug.ops.table import OpImplementation

norms = 0  # how often the op below ran
events: list[str] = []


def norm_forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    global norms
    norms += 1
    return reference.forward(*args, **kwargs)


def export_names(model: torch.nn.Module, path: str | Path, *, upper: bool = False) -> ExportResult:
    """The names of a model's parameters, one a line."""
    names = "\n".join(name for name, _ in model.named_parameters())
    Path(path).write_text(names.upper() if upper else names)
    return ExportResult("names", Path(path), (), len(names), 0.0)


@hookimpl
def fastplug_families() -> list[Family]:
    return [Family("tiny", "fastplug_tiny.modeling", "Tiny", logit_scale=lambda config: 0.5)]


@hookimpl
def fastplug_ops() -> list[OpImplementation]:
    functions = SimpleNamespace(forward=norm_forward, backward=reference.backward)
    return [OpImplementation("rms_norm", "counting", functions, priority=99)]


@hookimpl
def fastplug_exporters() -> list[Exporter]:
    return [Exporter("names", "the names of the parameters", export_names)]


@hookimpl
def fastplug_choose(site: Any, candidates: Sequence[Any]) -> str | None:
    return "its owner wants it as it is" if site.name.endswith("layers.2") else None


@hookimpl
def fastplug_after_apply(applied: Any) -> None:
    events.append(f"applied to {type(applied.model).__name__}")


@hookimpl
def fastplug_after_undo(model: Any, report: Any) -> None:
    events.append(f"undone, {len(report.patched)} sites")
