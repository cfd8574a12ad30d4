"""The commands. Each imports what it needs when it runs, so that ``fastplug --help`` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastplug.cli.flags import command
from fastplug.memory.policy import Policy
from fastplug.options import Options

app = typer.Typer(
    help="Faster, smaller fine-tuning of language models inside the trainer you already use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model id of the Hugging Face hub, or a folder.")]
Adapter = Annotated[Path | None, typer.Option(metavar="DIR", help="The folder of a LoRA adapter to put on it.")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu, ... Default: the first GPU, else the CPU.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto for what the model is stored in.")]
Quant = Annotated[
    str | None, typer.Option(help="4-bit linear layers: nf4 or fp4 of bitsandbytes, as in QLoRA, or hqq of fastplug.")
]
POLICIES = ", ".join(policy.value for policy in Policy)
Rank = Annotated[int | None, typer.Option(min=0, help="The rank of a new LoRA adapter on all linear layers; 0: none.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from fastplug import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
@command
def doctor(
    options: Options,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A model id or folder; its weights are not needed.")
    ] = None,
    adapter: Adapter = None,
    rank: Rank = None,
    quant: Quant = None,
    dtype: Dtype = "auto",
    device: Device = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    families: Annotated[bool, typer.Option("--families", help="Print what is fused per model family instead.")] = False,
) -> None:
    """Show the device, the versions, the plugins, and what each part of MODEL would get, or why not."""
    from fastplug.cli.doctor import diagnose, render, render_families, render_json

    if families:
        render_families(options, json)
        return
    found = diagnose(options, model, device=device, dtype=dtype, quant=quant, adapter=adapter, rank=rank)
    (render_json if json else render)(found)
    if options.strict and found.report is not None:
        found.require_all()


@app.command()
@command
def verify(
    model: Model,
    options: Options,
    adapter: Adapter = None,
    rank: Rank = None,
    quant: Quant = None,
    dtype: Dtype = "auto",
    device: Device = None,
    layers: Annotated[int | None, typer.Option(min=1, help="How many decoder layers to compare. Default: all.")] = None,
    batch: Annotated[
        str, typer.Option(metavar="ROWSxTOKENS|FILE", help="The size of a random batch, or a text file, a row a line.")
    ] = "2x64",
    tolerance: Annotated[float, typer.Option(min=1.0, help="Allowed multiple of the original's own error.")] = 2.0,
    all_rows: Annotated[bool, typer.Option("--all", help="Print every comparison, not only the worst.")] = False,
) -> None:
    """Compare MODEL with and without fastplug: loss, every layer's output, every gradient. Exits 1 on a mismatch.

    Without an adapter, a new one of rank 16 is put on all linear layers; --rank 0 verifies full fine-tuning.
    """
    from fastplug.cli.loading import make_batch, model_to_train
    from fastplug.cli.verifying import show
    from fastplug.patching.engine import apply
    from fastplug.verifying import verify as compare

    loaded = model_to_train(model, adapter=adapter, rank=rank, quant=quant, dtype=dtype, device=device)
    rows = make_batch(loaded, model, batch)
    apply(loaded, options)
    result = compare(loaded, rows, layers=layers, tolerance=tolerance)
    show(result, all_rows)
    if not result.ok:
        raise typer.Exit(1)


@app.command()
@command
def export(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make.")],
    adapter: Adapter = None,
    format: Annotated[str, typer.Option(help="merged_16bit, lora, or a format of a plugin.")] = "merged_16bit",
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="An option of the format. Repeatable.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The original 16-bit base, to merge onto instead of MODEL's own.")
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(help="nf4, fp4 or int8: load MODEL as the training did, to merge onto the decoded weights."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not reload what was written and compare it with the live model.")
    ] = False,
) -> None:
    """Write MODEL, or MODEL with an adapter, in one of the export formats, and prove what was written."""
    from fastplug.cli.exporting import run

    run(model, out, adapter, format, option or [], overwrite, base=base, quant=quant, verify=not no_verify)


@app.command()
@command
def plan(
    model: Model,
    gpu: Annotated[
        str, typer.Option(metavar="NAME|SIZE", help="Its name (H100), its memory (24GiB), or both: 'RTX 4090: 20GiB'.")
    ] = "H100",
    seq: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a micro-batch.")] = 1,
    rank: Annotated[int, typer.Option(min=0, help="Of LoRA on all linear layers; 0 trains all weights.")] = 16,
    adapter: Adapter = None,
    quant: Annotated[
        str | None,
        typer.Option(
            help="nf4, fp4 (-single: without double quantization), int8, fp8, int4. Default: as it is stored."
        ),
    ] = None,
    dtype: Dtype = "auto",
    optimizer: Annotated[
        str,
        typer.Option(help="adamw, adamw_8bit, paged_adamw, paged_adamw_8bit, lion, lion_8bit, sgd, adafactor, none."),
    ] = "adamw",
    accumulation: Annotated[int, typer.Option(min=1, help="Micro-batches of an optimizer step.")] = 1,
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="POLICY", help=f"What layers may keep: {POLICIES}. Repeatable. Default: any of them."),
    ] = None,
    residual_dtype: Annotated[
        str | None, typer.Option(help="Of the residual stream; default: as the model is.")
    ] = None,
    autocast: Annotated[bool, typer.Option("--autocast", help="16-bit products over a model in float32.")] = False,
    prepared: Annotated[
        bool, typer.Option("--prepared", help="Embedding, norms and head in float32, as PEFT prepares 4-bit models.")
    ] = False,
    headroom: Annotated[str | None, typer.Option(help="What to leave to others: 2GiB, or 0.1 of the memory.")] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What offloading may take of the host's memory: 64GiB. Default: any amount."),
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="sdpa, flash_attention_2, eager. Default: the config's.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the table as stacked bars.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Foretell memory and time of training MODEL under every policy, and plan the fastest that fits. Loads no weights.

    Also prints the longest context and the largest batch that fit.
    """
    from fastplug.cli.planning import run

    given = {
        "gpu": gpu,
        "sequence": seq,
        "batch": batch,
        "rank": rank,
        "adapter": adapter,
        "quant": quant,
        "dtype": dtype,
        "optimizer": optimizer,
        "accumulation": accumulation,
        "policies": tuple(policy or ()),
        "residual_dtype": residual_dtype,
        "autocast": autocast,
        "prepared": prepared,
        "headroom": headroom,
        "host_memory": host_memory,
        "attention": attention,
    }
    run(model, picture, json, given)


@app.command()
@command
def expand(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make.")],
    every: Annotated[int | None, typer.Option(metavar="N", help="Copy every N-th block behind itself.")] = None,
    count: Annotated[int | None, typer.Option(metavar="N", help="Or: insert N copies, evenly.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> None:
    """Write MODEL with inserted blocks that add nothing yet, to be trained alone (LLaMA-Pro). Loads no model."""
    from fastplug.cli.expanding import run

    run(model, out, every, count, overwrite)


@app.command("convert-adapter")
@command
def convert_adapter(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A DoRA adapter, or a training checkpoint.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make.")],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base it was trained on. Default: what the adapter says.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the LoRA adapter; default: twice that of DoRA.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The adapter_config.json of the run that wrote the checkpoint.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="The run's lora_alpha, where there is no such file.")] = None,
    name: Annotated[str | None, typer.Option(help="Which adapter, where a checkpoint holds several.")] = None,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> None:
    """Write a DoRA adapter as a LoRA adapter (what is lost is printed), or that of a checkpoint as PEFT reads it.

    Checkpoints: the folders that FSDP shards them into, or a file with the full state.
    """
    from fastplug.cli.converting import run

    run(
        source, out, base=base, rank=rank, config=config, alpha=alpha, name=name, device=device, overwrite=overwrite
    )  # fmt: skip


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def demo(context: typer.Context) -> None:
    """QLoRA fine-tuning of a small model with and without fastplug: a plot, an adapter, a merged model."""
    from fastplug.demo.command import demo as function

    inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    inner.command()(command(function))
    entry: Any = typer.main.get_command(inner)
    result = entry.main(args=list(context.args), prog_name="fastplug demo", standalone_mode=False)
    if isinstance(result, int) and result:
        raise typer.Exit(result)
