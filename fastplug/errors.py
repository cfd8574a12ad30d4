"""The exceptions that fastplug raises on purpose. Each message says what, why, and the way out."""

from __future__ import annotations


class FastPlugError(Exception):
    """Base class of all errors that fastplug raises on purpose."""


class OptionError(FastPlugError, ValueError):
    """An option has an unknown name or a value it cannot have."""


class ModelError(FastPlugError, TypeError):
    """The given object is not a model that fastplug can work on."""


class DataError(FastPlugError, ValueError):
    """A document or a batch cannot be packed or flattened as it is."""


class StrictError(FastPlugError, RuntimeError):
    """``strict=True`` was given and less was patched than expected. The model is unchanged."""


class HostMemoryError(FastPlugError, MemoryError):
    """The host has less memory left than offloading needs."""


class MissingExtra(FastPlugError, ImportError):
    """A feature needs a package of one of fastplug's extras."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: pip install 'fastplug[{extra}]'", name=package)
