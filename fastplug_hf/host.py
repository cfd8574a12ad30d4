"""Reaching the Trainer from a callback: no event hands it over, but it is the ``self`` of a calling frame."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_GUARD = "_fastplug_guard"
Tell = Callable[[Any, BaseException], None]


def caller(kind: type[T]) -> T | None:
    """The nearest calling method's ``self`` that is a ``kind``."""
    frame = sys._getframe(1).f_back
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, kind):
            return found
        frame = frame.f_back
    return None


def calling_value(name: str) -> str | None:
    """The string that the nearest calling function has under this name, or None."""
    frame = sys._getframe(1).f_back
    while frame is not None:
        found = frame.f_locals.get(name)
        if isinstance(found, str):
            return found
        frame = frame.f_back
    return None


def guard(trainer: Any, tell: Tell) -> None:
    """Call ``tell(trainer, error)`` when an exception leaves the ``train()`` of this one Trainer.

    Its class is swapped for a subclass of the same name; no other Trainer is touched.
    """
    kind: Any = type(trainer)
    if _GUARD not in kind.__dict__:
        trainer.__class__ = _guarded(kind, tell)


@functools.cache
def _guarded(kind: Any, tell: Tell) -> Any:
    @functools.wraps(kind.train)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return kind.train(self, *args, **kwargs)
        except BaseException as error:
            tell(self, error)
            raise

    namespace = {"train": train, "__module__": kind.__module__, "__qualname__": kind.__qualname__, _GUARD: True}
    return type(kind.__name__, (kind,), namespace)
