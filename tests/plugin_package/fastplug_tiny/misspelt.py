"""An entry point with a hook that does not exist."""

from __future__ import annotations

from fastplug import hookimpl


@hookimpl
def fastplug_familys() -> list[object]:
    return []
