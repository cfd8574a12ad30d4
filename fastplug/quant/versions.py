"""Layers of other versions of their library than those known here: refused by name, and never decoded by guess."""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from fastplug.quant.codec import EncodedWeight

Read = Callable[[Any, nn.Module], EncodedWeight | str]

# What it takes to read an attribute that is not there, or is something else than before.
_ERRORS = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)


def of_known_version(library: str | None = None) -> Callable[[Read], Read]:
    """Make a codec's ``read`` answer with a reason for layers that lack what it reads, or have another kind of it.

    Args:
        library: The package whose layers they are. Default: the one of the layer's class.
    """

    def around(read: Read) -> Read:
        @functools.wraps(read)
        def guarded(self: Any, linear: nn.Module) -> EncodedWeight | str:
            try:
                return read(self, linear)
            except _ERRORS as error:
                return unknown(linear, f"{type(error).__name__}: {error}", library)

        return guarded

    return around


def unknown(linear: nn.Module, what: str, library: str | None = None) -> str:
    """The reason for a layer that its library makes in another way than the versions known here: ``what`` is odd."""
    library = library or type(linear).__module__.partition(".")[0]
    return f"its {type(linear).__name__} is not as it is known here, in {library} {version(library)}: {what}"


def version(library: str) -> str:
    """The version of a package by the name under which it is imported."""
    found = getattr(sys.modules.get(library), "__version__", None)
    if found is None:
        try:
            found = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            return "of an unknown version"
    return str(found)
