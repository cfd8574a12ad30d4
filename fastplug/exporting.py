"""``fastplug.export``: write a model in one of the formats that fastplug and its plugins know."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterable
from typing import Any

from fastplug.errors import OptionError
from fastplug.exporters import Exporter, ExportResult
from fastplug.manager import manager


def export(model: Any, path: str | os.PathLike[str], format: str = "merged_16bit", **options: Any) -> ExportResult:
    """Write a model to ``path``.

    Args:
        model: A live model, patched by fastplug or not; what else it may be (the folder of one) is the format's matter.
        path: Where to. It is complete when it is there.
        format: ``"merged_16bit"``, ``"lora"``, or a format of a plugin; see :func:`formats`.
        options: The format's own options.

    Returns:
        What was written, with notes on what to look at.

    Raises:
        OptionError: An unknown format or option, naming the nearest one.
        ExportError: The model cannot be written in this format. Nothing is left under ``path``.
        ModelError: A quantized weight of a live model is damaged.
        OSError: ``path`` exists, cannot be written, or the disk is full. Nothing is left under ``path``.
    """
    exporter, implied = find_format(format)
    format, options = exporter.format, {**implied, **options}
    accepted = option_names(exporter)
    for name in options:
        if accepted is not None and name not in accepted:
            raise OptionError(f"fastplug: {format} has no option {name!r}; {_nearest(name, accepted, 'its options')}")
    _refuse_damaged(model)
    return exporter.export(model, path, **options)


def _refuse_damaged(model: Any) -> None:
    """Look at the quantized weights of a live model: a library may decode damaged ones without a word."""
    if not hasattr(model, "named_modules"):
        return
    from fastplug.ops.table import table_for
    from fastplug.options import Options
    from fastplug.patching.sites import Runtime
    from fastplug.quant.checking import check_weights

    device = next((parameter.device for parameter in model.parameters()), None)
    if device is not None and device.type != "meta":
        runtime = Runtime(Options(), table_for(device), manager().collect("fastplug_codecs"))
        check_weights(model, runtime.codec)


def find_format(format: str) -> tuple[Exporter, dict[str, str]]:
    """The exporter of a format and the options that its name implies: ``gguf:q4_k_m`` is ``gguf`` with ``types``.

    Raises:
        OptionError: An unknown format, naming the nearest one.
    """
    known = formats()
    name, colon, variant = format.partition(":")
    if format not in known and colon and name in known and known[name].variant:
        return known[name], {known[name].variant: variant}
    if format not in known:
        raise OptionError(f"fastplug: unknown export format {format!r}; {_nearest(format, known, 'formats')}")
    return known[format], {}


def formats() -> dict[str, Exporter]:
    """The known formats by name; a plugin's exporter takes the place of a built-in one of its name."""
    exporters: list[Exporter] = manager().collect("fastplug_exporters")
    return {exporter.format: exporter for exporter in exporters}


def option_names(exporter: Exporter) -> tuple[str, ...] | None:
    """The keyword-only parameters of an exporter; None if it takes any."""
    parameters = inspect.signature(exporter.export).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def _nearest(name: str, known: Iterable[str], what: str) -> str:
    names = list(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"{hint}({what}: {', '.join(names)})" if names else f"it has no {what}"


__all__ = ["export", "find_format", "formats", "option_names"]
