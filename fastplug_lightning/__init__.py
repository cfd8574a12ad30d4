"""fastplug for Lightning: ``Trainer(plugins=[FastPlug()])``, with ``lightning``, ``pytorch_lightning`` and Fabric.

The three ``*_callbacks`` functions are entry points that Lightning calls whenever a Trainer or a Fabric is made. They
cost nothing, and add nothing, unless a FastPlug exists.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastplug_lightning.plugin import FastPlug

__all__ = ["FastPlug"]


def __getattr__(name: str) -> Any:
    if name != "FastPlug":
        raise AttributeError(f"module 'fastplug_lightning' has no attribute {name!r}")
    from fastplug_lightning.plugin import FastPlug

    return FastPlug


def lightning_callbacks() -> list[Any]:
    """Entry point ``lightning.pytorch.callbacks_factory``."""
    return _callbacks("lightning.pytorch")


def pytorch_lightning_callbacks() -> list[Any]:
    """Entry point ``pytorch_lightning.callbacks_factory``."""
    return _callbacks("pytorch_lightning")


def fabric_callbacks() -> list[Any]:
    """Entry points ``lightning.fabric.callbacks_factory`` and ``lightning_fabric.callbacks_factory``."""
    if _in_use():
        from fastplug_lightning.fabric import attach_to_calling_fabric

        attach_to_calling_fabric()
    return []


def _callbacks(package: str) -> list[Any]:
    if not _in_use():
        return []
    from fastplug_lightning.callback import make_callback

    return [make_callback(package)]


def _in_use() -> bool:
    plugin = sys.modules.get("fastplug_lightning.plugin")
    return plugin is not None and len(plugin.alive) > 0
