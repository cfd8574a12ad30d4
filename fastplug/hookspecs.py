"""The extension contract: every hook of fastplug on one page.

A package extends fastplug by an entry point in the group ``fastplug`` that names a module (or object) with functions
of these names, each decorated with ``fastplug.hookimpl``. fastplug's own families, codecs, ops and exporters register
through the same hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from fastplug.exporters import Exporter
    from fastplug.families import Family
    from fastplug.ops.table import OpImplementation
    from fastplug.options import Options
    from fastplug.patching.engine import Applied
    from fastplug.patching.report import Report
    from fastplug.patching.sites import Choice, Implementation, Site
    from fastplug.quant import Codec

hookspec = pluggy.HookspecMarker("fastplug")


@hookspec
def fastplug_families() -> Sequence[Family]:
    """Rows that describe model families. A later plugin's row wins over an earlier one for the same classes."""
    raise NotImplementedError


@hookspec
def fastplug_codecs() -> Sequence[Codec]:
    """Weight formats: how a frozen weight is read from its module and decoded."""
    raise NotImplementedError


@hookspec
def fastplug_ops() -> Sequence[OpImplementation]:
    """Implementations of ops. For each op the available one of the highest priority on the device is used."""
    raise NotImplementedError


@hookspec
def fastplug_implementations() -> Sequence[Implementation]:
    """Forwards that can replace a module's, by role. The first of the highest priority that does not refuse is used."""
    raise NotImplementedError


@hookspec
def fastplug_exporters() -> Sequence[Exporter]:
    """Formats that ``fastplug.export`` can write. A later plugin's exporter wins over an earlier one of its name."""
    raise NotImplementedError


@hookspec(firstresult=True)
def fastplug_choose(site: Site, candidates: Sequence[Choice], options: Options) -> Choice | str | None:
    """Override one decision: one of ``candidates``, a reason (str) to leave the site alone, or None for no opinion.

    ``candidates`` holds what every implementation of the site's role answered, best first.
    """


@hookspec
def fastplug_after_apply(applied: Applied) -> None:
    """A model was patched. Called once per ``apply`` that changed something."""


@hookspec
def fastplug_after_undo(model: Any, report: Report) -> None:
    """A model was given back. ``report`` is the one of the ``apply`` that was undone."""
