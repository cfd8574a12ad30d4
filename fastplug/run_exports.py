"""The option ``export`` of the hosts' plugins: write what a training run made, in some formats, when it ends.

:func:`parse_exports` checks the option before the training starts, :func:`export_each` does the writing after it.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fastplug.errors import OptionError

if TYPE_CHECKING:
    from torch import nn

    from fastplug.exporters import Exporter, ExportResult

Exports: TypeAlias = "str | Iterable[str] | Mapping[str, Mapping[str, Any] | None]"
logger = logging.getLogger("fastplug")


def parse_exports(given: Exports | None) -> dict[str, dict[str, Any]]:
    """The option ``export`` as a mapping of formats to their options.

    Args:
        given: A format, several, or a mapping of formats to options (None: the defaults), say from YAML; None: nothing.

    Raises:
        OptionError: An unknown format or option, naming the nearest one, or something else than these.
    """
    if given is None:
        return {}
    from fastplug.exporting import option_names

    try:
        wanted = {given: None} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else None
        wanted = dict.fromkeys(given) if wanted is None else wanted
    except TypeError:
        wanted = {"": None}
    for name, options in wanted.items():
        if not isinstance(name, str) or not name or not (options is None or isinstance(options, Mapping)):
            raise OptionError(
                "fastplug: export must be a format such as 'merged_16bit', a list of formats, or a mapping of formats "
                f"to their options, not {given!r}"
            )
        accepted = option_names(_exporter(name))
        for option in options or ():
            if accepted is not None and option not in accepted:
                raise OptionError(f"fastplug: export: {name} has no option {option!r}; {_nearest(option, accepted)}")
    return {name: dict(options or {}) for name, options in wanted.items()}


def export_each(
    model: Any,
    folder: str | os.PathLike[str],
    exports: Mapping[str, Mapping[str, Any]],
    tokenizer: Any = None,
    strict: bool = False,
) -> list[ExportResult]:
    """Write a trained model in every format of :func:`parse_exports`, each to ``folder/<format>``.

    A format that takes a tokenizer gets ``tokenizer``, and what an earlier run wrote is replaced, unless the options
    say otherwise. A training run must not be lost to an export: one that fails is logged, and the next one is tried.

    Returns:
        What was written.

    Raises:
        Exception: With ``strict``, the error of an export that fails.
    """
    if not exports:
        return []
    from fastplug.exporting import export, option_names

    written = []
    for format, given in exports.items():
        path = Path(folder, format.replace(":", "-"))
        try:
            accepted = option_names(_exporter(format)) or ()
            own = {"tokenizer": tokenizer, "overwrite": True}
            options = {**{name: value for name, value in own.items() if name in accepted}, **given}
            written.append(export(model, path, format, **options))
        except Exception as error:
            if strict:
                raise
            logger.error(
                "fastplug: the trained model could not be written as %s (%s); it is still there to try again: "
                "fastplug.export(model, %r, format=%r)",
                format, error, str(path), format,
            )  # fmt: skip
    return written


def exportable(module: nn.Module) -> dict[str, nn.Module]:
    """The outermost models inside ``module`` that can be exported, by their names in it ("" for itself)."""
    found: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{outer}.") or not outer for outer in found)
        if not inside and hasattr(part, "save_pretrained") and hasattr(part, "config"):
            found[name] = part
    return found


def describe(result: ExportResult) -> str:
    """A line for a log, and one per note."""
    size = f"{len(result.files)} files, {result.bytes / 2**20:.1f} MiB in {result.seconds:.1f} s"
    return "\n".join([f"fastplug: wrote {result.format} to {result.path} ({size})", *result.notes])


def _exporter(format: str) -> Exporter:
    from fastplug.exporting import formats

    known = formats()
    name = format if format in known else format.partition(":")[0]  # gguf:q4_k_m
    if name not in known:
        raise OptionError(f"fastplug: export: unknown format {format!r}; {_nearest(format, known)}")
    return known[name]


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return (f"did you mean {nearest[0]!r}? " if nearest else "") + f"(known: {', '.join(names)})"


__all__ = ["Exports", "describe", "export_each", "exportable", "parse_exports"]
