"""What an exporter is, what it returns, and how it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastplug.errors import FastPlugError

if TYPE_CHECKING:
    from fastplug.exporters.proof import Proof

NOT_VERIFIED = "Not verified (verify=False): nothing was reloaded or compared with the live model."


class ExportError(FastPlugError, RuntimeError):
    """This model cannot be written in this format. Nothing was written under the final name."""


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        format: The name of the format.
        path: The finished folder.
        files: Names of the files in it, relative to ``path``, sorted.
        bytes: Their sizes together.
        seconds: Wall time of the export.
        notes: What the user should know, one sentence each (a missing tokenizer, an adapter that changes nothing).
        proof: The written file against the live model; None where it was not verified (``notes`` says so then).
    """

    format: str
    path: Path
    files: tuple[str, ...]
    bytes: int
    seconds: float
    notes: tuple[str, ...] = ()
    proof: Proof | None = None


@dataclass(frozen=True)
class Exporter:
    """One format of ``fastplug.export``.

    Attributes:
        format: Its name, as in ``format="merged_16bit"``.
        description: One line, for ``fastplug export --help``.
        export: ``export(model, path, **options) -> ExportResult``. Its keyword-only parameters are the format's
            options. It either finishes ``path`` or raises and leaves nothing there.
        variant: The option that may stand behind the name: ``types`` in ``format="gguf:q4_k_m"``.
    """

    format: str
    description: str
    export: Callable[..., ExportResult]
    variant: str = ""
