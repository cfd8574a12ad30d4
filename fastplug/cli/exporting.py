"""``fastplug export``: load, write, say what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from fastplug.cli.loading import local_folder, one_sentence
from fastplug.errors import OptionError
from fastplug.exporters.models import load
from fastplug.exporting import export, find_format, option_names

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def run(
    model: str,
    out: Path,
    adapter: Path | None,
    format: str,
    option: list[str],
    overwrite: bool,
    *,
    base: Path | None = None,
    quant: str | None = None,
    verify: bool = True,
) -> None:
    given = dict(_parse(item) for item in option)
    if overwrite:
        given["overwrite"] = True
    if base is not None:
        given["base"] = str(base)
    if not verify:
        given["verify"] = False
    exporter, _ = find_format(format)  # raises, before minutes are spent on loading
    with one_sentence(f"{model} cannot be exported"):
        folder = local_folder(model)
        loaded = load(folder, adapter, quant)
        source = adapter or folder
        accepted = option_names(exporter) or ()
        if "tokenizer" in accepted and any((source / name).is_file() for name in TOKENIZER_FILES):
            given.setdefault("tokenizer", str(source))
        result = export(loaded, out, format, **given)
    typer.echo(f"{result.format}: {len(result.files)} files, {result.bytes / 2**20:.1f} MiB in {result.seconds:.1f} s")
    typer.echo(str(result.path))
    if result.proof is not None:
        typer.echo(f"proof: {result.proof}")
    for note in result.notes:
        typer.echo(f"note: {note}")


def _parse(item: str) -> tuple[str, Any]:
    name, equals, value = item.partition("=")
    if not equals or not name:
        raise OptionError(f"fastplug: --option needs NAME=VALUE, not {item!r}")
    try:
        return name.replace("-", "_"), json.loads(value)
    except json.JSONDecodeError:
        return name.replace("-", "_"), value
