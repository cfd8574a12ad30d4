"""How a kernel launcher becomes a ``torch.library`` custom op.

A launcher takes tensors, writes into some of them and returns nothing. That is the whole contract
``torch.compile`` needs to keep it as one opaque node, and the fake implementation is then "do nothing".
The dispatcher costs several times more host time than the launch itself, so eager calls go past it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch

P = ParamSpec("P")


def custom_op(*mutates: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Register a launcher as ``fastplug::<its name>``; ``mutates`` names the arguments it writes.

    The result calls the launcher directly in eager mode and the registered op while ``torch.compile`` traces.
    The op itself is the result's ``op`` attribute (for ``torch.library.opcheck``). Every argument needs an
    annotation that ``torch.library.infer_schema`` knows, and all are passed by position.
    """

    def register(launcher: Callable[P, None]) -> Callable[P, None]:
        op = torch.library.custom_op(f"fastplug::{launcher.__name__}", launcher, mutates_args=mutates)
        op.register_fake(lambda *args, **kwargs: None)

        @functools.wraps(launcher)
        def call(*args: P.args, **kwargs: P.kwargs) -> None:
            (op if torch.compiler.is_compiling() else launcher)(*args, **kwargs)

        call.op = op  # type: ignore[attr-defined]
        return call

    return register
