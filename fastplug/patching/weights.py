"""Whether decoded weights of a quantized base stay from step to step."""

from __future__ import annotations

from fastplug.memory.budget import FORCED
from fastplug.ops.lora.kept_weights import KeptWeights
from fastplug.options import Options
from fastplug.patching.sites import Runtime

# ``Options.base_weights`` -> whether decoded weights are kept beside the stored ones, and whether a backward leaves
# those that are not to the next forward; None is for as long as half of the device's memory is free.
CHOICES = {
    None: (False, None),
    "decoded": (False, False),
    "kept": (True, False),
    "auto": (None, False),
    "once": (False, True),
}


def keeping(choice: str | None, options: Options) -> bool | None:
    """Whether decoded weights are kept beside the stored ones: a memory budget is for what its plan knows of."""
    keep, _ = CHOICES[choice]
    return False if keep is None and options.memory is not None else keep


def planned(options: Options) -> bool:
    """Whether a memory plan says how many decoded weights of a quantized base stay: what is left is to be used."""
    budget = options.memory not in (None, *FORCED)
    return options.base_weights in (None, "auto", "once") and budget and options.compute == "exact"


def prepare(runtime: Runtime) -> str | None:
    """Set the runtime up for ``Options.base_weights``; returns what the report says about it, beside the plan's."""
    options, choice = runtime.options, runtime.options.base_weights
    once = False if options.graphs == "on" else CHOICES[choice][1]
    if planned(options):
        # What a layer's backward leaves takes the place of what the plan says that the layer keeps.
        runtime.weights = KeptWeights(True, limit=0, once=once is not False)
        return None
    keep = keeping(choice, options)
    if keep is not False or once is not False:
        runtime.weights = KeptWeights(keep, once=once)
    if choice == "once":
        if not once:
            return (
                "base_weights='once' does nothing with graphs='on': a recorded layer takes nothing from the step before"
            )
        return "quantized weights are decoded in a backward and kept for the next forward, where activations will be"
    if keep is False:
        return None
    many = "all" if keep else "as many as leave half of the device's memory free"
    return f"quantized weights are decoded once and kept in 16 bits beside their own format, {many}"
