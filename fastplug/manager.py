"""The plugin manager: built-ins and entry points behind the same hooks."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
from dataclasses import dataclass
from typing import Any

import pluggy

from fastplug import hookspecs

hookimpl = pluggy.HookimplMarker("fastplug")
logger = logging.getLogger("fastplug")

GROUP = "fastplug"
BUILTINS = (
    "fastplug.families",
    "fastplug.quant",
    "fastplug.ops.table",
    "fastplug.patching.forwards",
    "fastplug.patching.packed",
    "fastplug.exporters",
)


@dataclass(frozen=True)
class Plugin:
    """One plugin as ``fastplug doctor`` lists it; ``error`` says why it could not be loaded."""

    name: str
    distribution: str
    error: str | None = None


class Manager:
    """Holds one pluggy manager with the built-ins and, if asked for, all installed plugins."""

    def __init__(self, plugins: bool) -> None:
        self._manager = pluggy.PluginManager("fastplug")
        self._manager.add_hookspecs(hookspecs)
        self.plugins: list[Plugin] = []
        for name in BUILTINS:
            self._manager.register(importlib.import_module(name), name)
        if plugins:
            for entry in importlib.metadata.entry_points(group=GROUP):
                self._load(entry)

    def _load(self, entry: importlib.metadata.EntryPoint) -> None:
        distribution = entry.dist.name if entry.dist else entry.value
        try:
            plugin = entry.load()
            self._manager.register(plugin, entry.name)
            self._manager.check_pending()
        except Exception as error:  # one broken plugin must not take the rest down
            if self._manager.has_plugin(entry.name):
                self._manager.unregister(name=entry.name)
            message = f"{type(error).__name__}: {error}"
            logger.warning(
                "fastplug: plugin %r of %s could not be loaded and is ignored (%s); upgrade or uninstall %s",
                entry.name,
                distribution,
                message,
                distribution,
            )
            self.plugins.append(Plugin(entry.name, distribution, message))
        else:
            self.plugins.append(Plugin(entry.name, distribution))

    @property
    def hook(self) -> Any:
        return self._manager.hook

    def collect(self, hook: str) -> list[Any]:
        """All items that the plugins return from a list hook, built-ins first."""
        results = getattr(self._manager.hook, hook)()
        return [item for items in reversed(results) for item in items or ()]


def manager(plugins: bool = True) -> Manager:
    """The manager of this process: with the installed plugins, or with the built-ins alone."""
    return _manager(plugins)


@functools.cache
def _manager(plugins: bool) -> Manager:  # manager() and manager(True) are one
    return Manager(plugins)
