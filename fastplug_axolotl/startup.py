"""Short plugin names for Axolotl: what ``fastplug_axolotl.pth`` calls when ``axolotl.integrations.base`` is imported.

Axolotl's ``load_plugin`` splits a name at its last dot, so ``plugins: [fastplug]`` fails there before anything is
imported, and ``axolotl train`` starts new processes, so that nothing a user imports could help. A ``.pth`` file runs at
every start of the interpreter. Ours only puts a finder in front of ``sys.meta_path``, which compares the name of each
module with one string; it opens no file and imports nothing. Everything else is here, and runs in processes that import
Axolotl's plugins: the finder leaves ``sys.meta_path``, and names without a dot are looked up in the entry-point group
``axolotl.plugins`` of the installed packages. All other names go to Axolotl's own function as they are.
"""

from __future__ import annotations

import difflib
import functools
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

FINDER = "FastPlugStartup"  # the name of the class that the .pth file makes
GROUP = "axolotl.plugins"


def find_spec(name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
    """The spec that the other finders have for ``axolotl.integrations.base``, with a loader that calls :func:`wrap`."""
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec = find(name, path, target) if find is not None and not _ours(finder) else None
        if spec is not None:
            _wrap_after_loading(spec.loader)
            return spec  # type: ignore[no-any-return]
    return None


def _ours(finder: object) -> bool:
    return getattr(finder, "__name__", None) == FINDER


def _wrap_after_loading(loader: Any) -> None:
    def exec_module(module: ModuleType) -> None:
        del loader.exec_module  # the class's own again
        loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not _ours(finder)]
        wrap(module)

    loader.exec_module = exec_module


def wrap(base: ModuleType) -> None:
    """Make ``base.load_plugin`` understand names without a dot."""
    original = getattr(base, "load_plugin", None)
    if original is None:  # an Axolotl that loads plugins in another way
        return

    @functools.wraps(original)
    def load_plugin(plugin_name: str) -> Any:
        if not isinstance(plugin_name, str) or "." in plugin_name:
            return original(plugin_name)
        path = resolve(plugin_name)
        if path is None:
            try:
                return original(plugin_name)
            except ValueError as error:
                raise ValueError(_unknown(plugin_name)) from error
        try:
            return original(path)
        except ImportError as error:  # which Axolotl would only log, and train without the plugin
            raise RuntimeError(f"plugins: {plugin_name} ({path}) cannot be imported: {error}") from error

    base.load_plugin = load_plugin  # type: ignore[attr-defined]


def resolve(name: str) -> str | None:
    """The dotted path of the plugin class that an installed package calls ``name``, or None.

    Raises:
        ValueError: Several packages give that name to different classes.
    """
    paths = sorted({entry.value.replace(":", ".") for entry in entry_points(group=GROUP) if entry.name == name})
    if len(paths) > 1:
        raise ValueError(f"plugins: the name {name!r} is claimed by {' and '.join(paths)}; write out the one you mean")
    return paths[0] if paths else None


def _unknown(name: str) -> str:
    known = sorted({entry.name for entry in entry_points(group=GROUP)})
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"those that do: {', '.join(known) or 'none'}"
    return (
        f"plugins: {name!r} has no dot, and no installed package registers a plugin of that name; {hint} "
        "Anything else is written as module.Class"
    )
