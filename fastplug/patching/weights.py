"""Whether decoded weights of a quantized base stay from step to step."""

from __future__ import annotations

from fastplug.memory.budget import FORCED
from fastplug.ops.lora.kept_weights import KeptWeights
from fastplug.options import Options
from fastplug.patching.sites import Runtime

KEEP = {"kept": True, "decoded": False, "auto": None, "once": False}


def keeping(choice: str, options: Options) -> bool | None:
    """What ``"kept"``, ``"decoded"`` or ``"auto"`` comes to: a memory budget is for what its plan knows of."""
    keep = KEEP[choice]
    return False if keep is None and options.memory is not None else keep


def chosen(options: Options) -> str:
    """``Options.base_weights`` with what None comes to: what a budget leaves is there to be used."""
    return options.base_weights or ("auto" if _budget(options) else "decoded")


def planned(options: Options) -> bool:
    """Whether a memory plan says how many decoded weights of a quantized base stay."""
    return chosen(options) in ("auto", "once") and _budget(options) and options.compute == "exact"


def _budget(options: Options) -> bool:
    return options.memory not in (None, *FORCED)


def prepare(runtime: Runtime) -> str | None:
    """Set the runtime up for ``Options.base_weights``; returns what the report says about it, beside the plan's."""
    options = runtime.options
    asked = chosen(options) == "once"
    once = asked and options.graphs != "on"
    if planned(options):
        runtime.weights = KeptWeights(True, limit=0, once=once)
        return None
    if asked and not once:
        return "base_weights='once' does nothing with graphs='on': a recorded layer takes nothing from the step before"
    keep = keeping(chosen(options), options)
    if once:
        runtime.weights = KeptWeights(False, once=True)
        return "quantized weights are decoded in a backward and kept for the next forward, where activations will be"
    if keep is False:
        return None
    runtime.weights = KeptWeights(keep)
    many = "all" if keep else "as many as leave half of the device's memory free"
    return f"quantized weights are decoded once and kept in 16 bits beside their own format, {many}"
