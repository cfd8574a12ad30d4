"""Compile the kernels of a computation side by side, before they are needed one after another.

The computation runs once with launches that compile and do nothing else, in threads: Triton's compiler waits for an
assembler half of the time. What it computes is garbage, so nothing that outlives it may be kept: see :func:`going`.

Up to 3.6 Triton also has a C compiler build what launches a kernel, at its first launch, which takes as long as the
kernel; the threads have it built, too.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

from fastplug.devices import triton_reason

WORKERS = 8
_GOING: ContextVar[bool] = ContextVar("fastplug_ahead", default=False)


def going() -> bool:
    """Whether kernels are being compiled ahead: what is computed now is garbage."""
    return _GOING.get()


def launched(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """``kernel[grid]``, or what compiles the kernel only."""
    return partial(kernel.warmup, grid=grid) if going() else kernel[grid]  # type: ignore[no-any-return]


def possible() -> bool:
    """Whether there is a Triton that compiles in threads."""
    return triton_reason() is None and hasattr(importlib.import_module("triton"), "AsyncCompileMode")


def _with_launchers(mode: type[Any]) -> type[Any]:
    """A subclass of Triton's ``AsyncCompileMode`` that builds launchers as well."""

    class Mode(mode):  # type: ignore[misc]
        def submit(self, key: Any, compile_kernel: Callable[[], Any], *others: Any) -> Any:
            def compile_and_build() -> Any:
                kernel = compile_kernel()
                with suppress(Exception):  # the first launch builds it, or says why it cannot
                    importlib.import_module("triton.runtime").driver.active.launcher_cls(kernel.src, kernel.metadata)
                return kernel

            return super().submit(key, compile_and_build, *others)

    return Mode


@contextmanager
def compiling() -> Iterator[None]:
    """What runs meanwhile launches nothing; when it ends, all that it would have launched is compiled.

    A kernel that does not compile is left to its first launch, which says so. Backward passes stay in this thread, so
    that other threads launch as ever.
    """
    triton = importlib.import_module("triton")  # there is none on every machine
    single = torch.autograd.set_multithreading_enabled(False)
    workers = ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1))
    with workers, _with_launchers(triton.AsyncCompileMode)(workers, ignore_errors=True), single:
        token = _GOING.set(True)
        try:
            yield
        finally:
            _GOING.reset(token)
