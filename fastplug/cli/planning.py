"""``fastplug plan``: memory and time of a training run, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from fastplug.planning import plan

WIDTH = 128  # of the table with all its columns: for files and pipes, whose width nobody knows


def run(model: str, picture: Path | None, json: bool, given: dict[str, Any]) -> None:
    """Print the forecast, as tables or as JSON, and draw it where asked to."""
    found = plan(model, **given)
    if picture is not None:
        found.picture(picture)
    if json:
        typer.echo(found.to_json())
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, WIDTH))
    console.print(found)
    if picture is not None:
        typer.echo(f"picture: {picture}")
