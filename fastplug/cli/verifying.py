"""How ``fastplug verify`` shows its result."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from fastplug.verifying import VerifyResult

WORST = 12


def show(result: VerifyResult, all_rows: bool = False) -> None:
    """The table, the notes and the verdict, on standard output."""
    console = Console()
    console.print(result.table(None if all_rows else WORST))
    for note in result.notes:
        console.print(f"note: {escape(note)}")
    for name in result.dead:
        console.print(f"[yellow]no gradient:[/] {escape(name)}")
    console.print(escape(str(result)), style="green" if result.ok else "bold red")
