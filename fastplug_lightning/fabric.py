"""Fabric: patch a model in ``fabric.setup`` and ``fabric.setup_module``, between the move to the device and wrapping.

Fabric calls no callback there. Its entry point for callbacks is called by its constructor when its strategy exists: the
Fabric is the ``self`` of a calling frame, and its strategy's two set-up methods are wrapped on that one instance.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from fastplug.errors import FastPlugError
from fastplug_lightning.plugin import FastPlug, find


def attach_to_calling_fabric() -> None:
    """Wrap the set-up methods of the Fabric under construction, if its plugins hold a FastPlug."""
    frame = sys._getframe(1)
    while frame is not None:
        fabric: Any = frame.f_locals.get("self")
        if frame.f_code.co_name == "__init__" and hasattr(fabric, "_strategy") and hasattr(fabric, "_connector"):
            attach(fabric._strategy)
            return
        frame = frame.f_back  # type: ignore[assignment]


def attach(strategy: Any) -> None:
    """Wrap ``setup_module`` and ``setup_module_and_optimizers`` of a Fabric strategy that a FastPlug serves.

    Raises:
        FastPlugError: Adapter checkpoints are asked for.
    """
    plug = find(getattr(strategy, "_checkpoint_io", None))
    if plug is None:
        return
    if plug.checkpoint == "adapter":
        raise FastPlugError(
            "fastplug: checkpoint='adapter' is for the Trainer; with Fabric, fabric.save(..., filter={'model': "
            "lambda name, value: 'lora_' in name}) writes what you choose"
        )
    for name in ("setup_module", "setup_module_and_optimizers"):
        setattr(strategy, name, functools.partial(_setup, plug, strategy, name))


def _setup(plug: FastPlug, strategy: Any, name: str, module: Any, *args: Any, **kwargs: Any) -> Any:
    plug.apply(module, speak=strategy.is_global_zero)
    return getattr(type(strategy), name)(strategy, module, *args, **kwargs)
