"""fastplug for Axolotl: ``plugins: [fastplug]``, or ``plugins: [fastplug_axolotl.FastPlugPlugin]``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastplug_axolotl.args import FastPlugArgs
    from fastplug_axolotl.plugin import FastPlugPlugin

__all__ = ["FastPlugArgs", "FastPlugPlugin"]

_HOME = {"FastPlugArgs": "fastplug_axolotl.args", "FastPlugPlugin": "fastplug_axolotl.plugin"}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module 'fastplug_axolotl' has no attribute {name!r}; its plugin is FastPlugPlugin")
    try:
        return getattr(importlib.import_module(_HOME[name]), name)
    except ImportError as error:
        from fastplug.errors import FastPlugError

        # Not an ImportError: Axolotl only logs those of a plugin, and trains without it.
        raise FastPlugError(
            f"fastplug_axolotl.{name} needs Axolotl 0.13 or later (pip install 'fastplug[axolotl]'): {error}"
        ) from error
