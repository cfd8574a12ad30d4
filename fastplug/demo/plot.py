"""The demo's one picture: both losses, and speed and memory beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastplug.demo.config import RunResult

_GREY, _BLUE, _INK, _RED = "#9aa3ad", "#1463b8", "#222222", "#a83232"


def draw(baseline: RunResult, ours: RunResult, path: Path, device: str, caution: str | None = None) -> Path:
    """Write the PNG and return its path. Draws without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    loss, speed, memory = figure.subplots(1, 3, width_ratios=(2.6, 1, 1))
    figure.suptitle(f"QLoRA fine-tuning with and without fastplug, {device}", fontsize=12, color=_INK)
    if caution is not None:
        figure.supxlabel(caution, fontsize=9, color=_RED)
    _losses(loss, baseline, ours)
    _bars(speed, "Speed", "tokens per second", (baseline.tokens_per_second, ours.tokens_per_second), "{:,.0f}")
    if baseline.peak_bytes is None or ours.peak_bytes is None:
        memory.text(0.5, 0.5, "memory " + baseline.memory_kind, ha="center", va="center", wrap=True, fontsize=9)
        memory.set_axis_off()
    else:
        kind = baseline.memory_kind
        _bars(memory, "Memory", f"{kind}, GiB", (baseline.peak_bytes / 2**30, ours.peak_bytes / 2**30), "{:.2f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _losses(axes: Any, baseline: RunResult, ours: RunResult) -> None:
    """A wide pale line under a dashed thin one: both can be seen where they coincide."""
    steps = range(1, len(baseline.losses) + 1)
    axes.plot(steps, baseline.losses, color=_GREY, linewidth=5, alpha=0.6, solid_capstyle="round", label=baseline.name)
    axes.plot(steps, ours.losses, color=_BLUE, linewidth=1.6, linestyle=(0, (4, 2)), label=ours.name)
    axes.set(title="Loss on the answers", xlabel="optimizer step", ylabel="cross entropy per token (nats)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _tidy(axes, "both")


def _bars(axes: Any, title: str, unit: str, values: tuple[float, float], form: str) -> None:
    bars = axes.bar(("without", "with"), values, color=(_GREY, _BLUE), width=0.62)
    axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=10)
    ratio = f"{values[1] / values[0]:.2f}x" if values[0] > 0 else ""
    axes.set(title=f"{title}: {ratio}" if ratio else title, ylabel=unit, xlabel="fastplug")
    axes.margins(y=0.15)
    _tidy(axes, "y")


def _tidy(axes: Any, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
