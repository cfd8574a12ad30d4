"""fastplug: faster, smaller fine-tuning of language models inside the trainer you already use.

Importing this package does nothing else: no torch, no patch, no environment variable. The public names load what
they need when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastplug.errors import DataError, FastPlugError, MissingExtra, ModelError, OptionError, StrictError
    from fastplug.exporting import export
    from fastplug.manager import hookimpl
    from fastplug.memory.forecast import Forecast
    from fastplug.memory.plan import Plan
    from fastplug.options import Options
    from fastplug.patching.engine import Applied, apply, report, undo
    from fastplug.patching.report import Report
    from fastplug.planning import plan
    from fastplug.verifying import VerifyResult, verify

__version__ = "0.1.0"

_HOME = {
    "apply": "fastplug.patching.engine",
    "undo": "fastplug.patching.engine",
    "report": "fastplug.patching.engine",
    "Applied": "fastplug.patching.engine",
    "Report": "fastplug.patching.report",
    "verify": "fastplug.verifying",
    "VerifyResult": "fastplug.verifying",
    "export": "fastplug.exporting",
    "plan": "fastplug.planning",
    "Forecast": "fastplug.memory.forecast",
    "Plan": "fastplug.memory.plan",
    "Options": "fastplug.options",
    "hookimpl": "fastplug.manager",
    "DataError": "fastplug.errors",
    "FastPlugError": "fastplug.errors",
    "MissingExtra": "fastplug.errors",
    "ModelError": "fastplug.errors",
    "OptionError": "fastplug.errors",
    "StrictError": "fastplug.errors",
}

_MODULES = ("data", "layers")  # packages with public names of their own

__all__ = [
    "Applied",
    "DataError",
    "FastPlugError",
    "Forecast",
    "MissingExtra",
    "ModelError",
    "OptionError",
    "Options",
    "Plan",
    "Report",
    "StrictError",
    "VerifyResult",
    "apply",
    "export",
    "hookimpl",
    "plan",
    "report",
    "undo",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fastplug.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'fastplug' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
