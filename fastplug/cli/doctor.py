"""``fastplug doctor``: what is installed, what the device can do, and what a model would get."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastplug.cli.loading import model_device, outline
from fastplug.devices import kernel_reason
from fastplug.errors import StrictError
from fastplug.manager import Plugin, manager
from fastplug.ops.table import table_for
from fastplug.options import Options
from fastplug.patching.preview import inspect
from fastplug.patching.report import PATCHED, REFUSED, Report

PACKAGES = (
    "fastplug", "torch", "triton", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "lightning",
    "pytorch-lightning", "axolotl", "safetensors", "flash-attn", "torchao", "liger-kernel", "unsloth", "gguf", "onnx",
)  # fmt: skip
ALWAYS_LISTED = PACKAGES[:8]  # the others where they are installed


@dataclass
class Diagnosis:
    """What ``fastplug doctor`` found; ``report`` where a model was named."""

    device: str
    device_name: str
    memory_gib: float | None
    triton: str | None
    versions: dict[str, str | None]
    plugins: list[Plugin]
    ops: dict[str, str]
    model: str | None = None
    report: Report | None = None
    notes: list[str] = field(default_factory=list)

    def require_all(self) -> None:
        """What ``strict`` asks for.

        Raises:
            StrictError: Nothing would be patched, or a site would be refused.
        """
        assert self.report is not None
        if not self.report.patched or self.report.refused:
            count = len(self.report.refused)
            why = f"{count} sites would be refused" if count else "nothing would be patched"
            raise StrictError(f"fastplug (strict): {why} in {self.model}")


def diagnose(
    options: Options,
    model: str | None = None,
    *,
    device: str | None = None,
    dtype: str = "auto",
    quant: str | None = None,
    adapter: Path | None = None,
    rank: int | None = None,
) -> Diagnosis:
    """Look at this machine, and at a model's outline if one is named. Nothing is changed and no weight is loaded."""
    where = model_device(device)
    name, memory = _describe(where)
    found = Diagnosis(
        str(where),
        name,
        memory,
        kernel_reason(where),
        _versions(),
        manager(options.plugins).plugins,
        dict(table_for(where, options.kernels, options.plugins).names),
        model,
    )
    if model is not None:
        made = outline(model, adapter=adapter, rank=rank, quant=quant, dtype=dtype)
        found.report = inspect(made, options, where)
        found.notes = found.report.notes
    return found


def render(found: Diagnosis) -> None:
    """Tables on standard output."""
    console = Console()
    memory = "" if found.memory_gib is None else f", {found.memory_gib:.1f} GiB"
    console.print(f"[bold]device[/]   {found.device}: {escape(found.device_name)}{memory}")
    console.print(f"[bold]triton[/]   {escape(found.triton or 'ready')}")
    console.print("[bold]ops[/]      " + ", ".join(f"{op}: {name}" for op, name in found.ops.items()))
    versions = [f"{name} {version or '(not installed)'}" for name, version in found.versions.items()]
    console.print(f"[bold]versions[/] {', '.join(versions)}")
    for plugin in found.plugins:
        state = f"[red]not loaded: {escape(plugin.error)}[/]" if plugin.error else "loaded"
        console.print(f"[bold]plugin[/]   {escape(plugin.name)} ({escape(plugin.distribution)}): {state}")
    if not found.plugins:
        console.print("[bold]plugins[/]  none")
    if found.report is not None:
        console.print(_sites(found.report))
        for note in found.notes:
            console.print(f"note: {escape(note)}")


def render_json(found: Diagnosis) -> None:
    """The same as JSON."""
    values = asdict(found)
    if found.report is not None:
        values["report"] = found.report.as_dict()
    print(json.dumps(values, indent=1))


def render_families(options: Options, as_json: bool = False) -> None:
    """What is fused per family, plugins' rows among them."""
    from fastplug.families.table import HEADINGS, lines

    found = lines(manager(options.plugins).collect("fastplug_families"))
    if as_json:
        print(json.dumps([asdict(line) for line in found], indent=1))
        return
    table = Table(title="What is fused, by family", title_justify="left", title_style="bold")
    shown = [i for i, heading in enumerate(HEADINGS) if heading != "models"]  # too long for a terminal
    for i in shown:
        table.add_column(HEADINGS[i], no_wrap=i == 0)
    for line in found:
        values = list(asdict(line).values())
        table.add_row(*(escape(values[i]) for i in shown))
    Console().print(table)
    print("Models of other families are patched by structure: norms, MLPs, head and loss, each checked at the start.")


def _sites(report: Report) -> Table:
    table = Table(title=f"{report.model} on {report.device}", title_justify="left", title_style="bold")
    for heading in ("role", "status", "implementation", "reason"):
        table.add_column(heading)
    table.add_column("sites", justify="right")
    counts = Counter((d.role, d.status, d.implementation or "", d.reason or "") for d in report.decisions)
    for (role, status, implementation, reason), count in counts.items():
        colour = {PATCHED: "green", REFUSED: "red"}.get(status, "yellow")
        table.add_row(role, f"[{colour}]{status}[/]", escape(implementation), escape(reason), str(count))
    return table


def _describe(device: torch.device) -> tuple[str, float | None]:
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        capability = "" if torch.version.hip else f", compute capability {properties.major}.{properties.minor}"
        return f"{properties.name}{capability}", properties.total_memory / 2**30
    if device.type == "cpu":
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 if hasattr(os, "sysconf") else None
        return f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}", pages
    return f"{device.type} (not to be had on this machine)" if device.type == "cuda" else device.type, None


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package in ALWAYS_LISTED:
                found[package] = None
    return found
