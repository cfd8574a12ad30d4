"""``fastplug expand``: LLaMA-Pro's block expansion from folder to folder."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from fastplug.cli.loading import local_folder, one_sentence
from fastplug.layers.expansion_files import expand_folder


def run(model: str, out: Path, every: int | None, count: int | None, overwrite: bool) -> None:
    with one_sentence(f"{model} cannot be expanded"):
        folder = local_folder(model)
        before = _blocks(folder)
        made = expand_folder(folder, out, every=every, count=count, overwrite=overwrite)
    after = _blocks(made)
    typer.echo(str(made))
    typer.echo(f"{before} blocks became {after}; the {after - before} new ones add nothing until they are trained")


def _blocks(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config if "num_hidden_layers" in config else config.get("text_config", {})
    return int(config.get("num_hidden_layers", 0))
