"""The command line: ``fastplug doctor | plan | verify | export | demo``. Nothing heavy is imported until one runs."""

from __future__ import annotations

from fastplug.cli.app import app


def main() -> None:
    """The console script ``fastplug``."""
    app(prog_name="fastplug")


__all__ = ["app", "main"]
