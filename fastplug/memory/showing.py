"""Plans as tables of rich and as pictures of matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fastplug.errors import MissingExtra
from fastplug.memory.moments import HEAD
from fastplug.memory.plan import DECODED, Plan

if TYPE_CHECKING:
    from fastplug.memory.forecast import Forecast

GiB = 2**30
COLUMNS = {
    "weights": ("weights", "adapters", DECODED),
    "optimizer": ("optimizer", "gradients"),
    "activations": ("activations",),
    "logits": ("logits",),
    "workspace": ("workspace", "step", "fixed"),
    "reserve": ("slack", "context"),
}
"""Column -> the parts of a plan that it sums."""


def columns_of(plan: Plan) -> dict[str, int]:
    """The parts of a plan in bytes, in the columns of the tables; parts of other names count as workspace.

    Where the peak is in head and loss, the workspace is theirs: it counts as logits.
    """
    parts = dict(plan.parts)
    if plan.moment == HEAD:
        parts["logits"] = parts.pop("workspace", 0)
    known = {part for names in COLUMNS.values() for part in names}
    found = {name: sum(parts.get(part, 0) for part in names) for name, names in COLUMNS.items()}
    found["workspace"] += sum(size for name, size in parts.items() if name not in known)
    return found


def plan_table(plan: Plan) -> Table:
    """One plan: its parts at the moment of the peak, and what each layer keeps."""
    title = " ".join(
        filter(None, (plan.model, f"{plan.batch} x {plan.sequence} tokens", plan.gpu and f"on {plan.gpu}"))
    )
    table = Table(title=escape(title), title_justify="left", title_style="bold", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, size in columns_of(plan).items():
        if size:
            table.add_row(name, _gib(size))
    table.add_row("allocated", _gib(plan.allocated))
    style = "bold" if plan.fits else "bold red"
    table.add_row("reserved, with the CUDA context", f"{_gib(plan.total)} of {_gib(plan.budget)}", style=style)
    table.add_row("highest in", plan.moment)
    table.add_row("head and loss", _gib(plan.logits))
    if plan.host_bytes:
        table.add_row("host memory", _gib(plan.host_bytes))
    table.add_row("time of a step", f"{plan.ms:,.0f} ms")
    table.add_section()
    for where, policy in plan.places():
        table.add_row(where, policy.value)
    if plan.tile_rows is not None and any(policy.value != "keep" for policy in plan.policies):
        table.add_row("tokens in an MLP at once", f"{plan.tile_rows:,}")
    return table


def forecast_tables(forecast: Forecast) -> Group:
    """Every policy and the plan, a line each; what the plan is, what it rests on, and how far the memory reaches."""
    plan = forecast.plan
    title = f"{plan.model}, {plan.batch} x {plan.sequence} tokens, {_gib(plan.budget)}"
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 0, 0, 1), False
    table.add_column("GiB where layers", no_wrap=True)
    every = (*forecast.uniform.values(), plan)
    used = [name for name in COLUMNS if name != "reserve" and any(columns_of(p)[name] for p in every)]
    used += ["allocated", "reserve", "total"]
    used += ["host"] if any(p.host_bytes for p in every) else []
    for name in (*used, "ms", "tokens/s"):
        table.add_column(name, justify="right", overflow="fold")
    for policy, uniform in forecast.uniform.items():
        style = "dim" if _exceeds(uniform, forecast) else None
        table.add_row(policy.value, *_cells(uniform, used, forecast), style=style)
    table.add_section()
    table.add_row("the plan", *_cells(plan, used, forecast), style="bold")
    below = Table.grid(padding=(0, 1))
    below.add_column(no_wrap=True)
    below.add_column()
    for name, text in _explained(forecast, used):
        below.add_row(name, Text(text))
    return Group(table, below)


def _explained(forecast: Forecast, used: list[str]) -> list[tuple[str, str]]:
    """What the columns mean, what the numbers rest on, and how far the memory reaches."""
    plan, assumed = forecast.plan, forecast.assumed
    found = {"the plan": "; ".join(f"{where}: {policy.value}" for where, policy in plan.places())}
    if plan.tile_rows is not None and any(policy.value != "keep" for policy in plan.policies):
        found["MLPs"] = f"{plan.tile_rows:,} tokens at once in layers that do not keep everything"
    found["highest in"] = plan.moment
    found["optimizer"] = "its states, and the gradients that are there"
    found["logits"] = f"{_gib(plan.logits)} of head and loss at their own moment, listed where that is the highest"
    found["allocated"] = "what tensors take at the highest moment: torch.cuda.max_memory_allocated"
    found["reserve"] = assumed.get("reserve", "")
    found["total"] = "both: reserved memory and the CUDA context, as nvidia-smi and memory= count"
    found["budget"] = assumed.get("budget", "")
    if "host" in used:
        found["host"] = f"pinned memory of the host, {assumed.get('host', '')}"
    found["times"] = assumed.get("times", "")
    most = f"; the model's config is for {assumed['positions']}" if "positions" in assumed else ""
    found["longest context"] = (
        f"{forecast.longest_context:,} tokens, batch {plan.batch}{_host(forecast.longest_host)}{most}"
    )
    found["largest batch"] = f"{forecast.largest_batch:,} x {plan.sequence:,} tokens{_host(forecast.largest_host)}"
    lines = [(name, text) for name, text in found.items() if text]
    lines += [("note", note) for note in forecast.notes]
    if any(_exceeds(uniform, forecast) for uniform in forecast.uniform.values()):
        lines.append(("!", "more than there is"))
    return lines


def _exceeds(plan: Plan, forecast: Forecast) -> bool:
    return not plan.fits or _exceeds_host(plan, forecast)


def _exceeds_host(plan: Plan, forecast: Forecast) -> bool:
    return forecast.host_budget is not None and plan.host_bytes > forecast.host_budget


def _cells(plan: Plan, used: list[str], forecast: Forecast) -> list[str]:
    cells = {name: f"{size / GiB:.2f}" if size else "" for name, size in columns_of(plan).items()}
    cells["allocated"] = f"{plan.allocated / GiB:.2f}"
    cells["total"] = f"{plan.total / GiB:.2f}{'' if plan.fits else '!'}"
    host = f"{plan.host_bytes / GiB:.1f}{'!' if _exceeds_host(plan, forecast) else ''}"
    cells["host"] = host if plan.host_bytes else ""
    tokens = plan.batch * plan.sequence / plan.ms * 1e3 if plan.ms else 0.0
    return [*(cells[name] for name in used), f"{plan.ms:,.0f}", f"{tokens:,.0f}"]


def _host(size: int) -> str:
    return f", with {size / GiB:.0f} GiB of host memory" if size >= GiB else ""


def draw(plans: Mapping[str, Plan], path: str | Path) -> Path:
    """A horizontal stacked bar of each plan's parts, with the budget as a line; returns the file.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "demo", "a picture of a plan") from error
    path, some = Path(path), next(iter(plans.values()))
    figure: Any = Figure(figsize=(10, 1.6 + 0.5 * len(plans)), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever backend the user has chosen
    axes = figure.add_subplot()
    names = list(plans)
    left = [0.0] * len(names)
    for column in COLUMNS:
        sizes = [columns_of(plan)[column] / GiB for plan in plans.values()]
        if any(sizes):
            axes.barh(names, sizes, left=left, label=column)
        left = [a + b for a, b in zip(left, sizes)]
    for y, plan in enumerate(plans.values()):
        axes.text(left[y], y, f" {plan.total / GiB:.1f} GiB, {plan.ms:,.0f} ms", va="center", fontsize=8)
    axes.axvline(some.budget / GiB, color="black", linestyle="--", linewidth=1, label="budget")
    axes.set_xlim(0, max(*left, some.budget / GiB) * 1.2)
    axes.invert_yaxis()
    axes.set_xlabel("GiB at the highest moment of a step (what is allocated, and the reserve)")
    axes.set_title(f"{some.model}, {some.batch} x {some.sequence} tokens".strip(", "), fontsize=10)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=130)
    return path


def _gib(size: int) -> str:
    return f"{size / GiB:.2f} GiB"


__all__ = ["columns_of", "draw", "forecast_tables", "plan_table"]
