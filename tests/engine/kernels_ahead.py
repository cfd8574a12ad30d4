"""Which kernels a first step compiles before its first layer runs, and which later, on a GPU that is not there.

    python -m tests.engine.kernels_ahead lora,qlora

Prints a line of JSON for each kind: names compiled ahead and afterwards. See
``tests.engine.kernels_of_a_step``, whose launches compute nothing.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.engine.kernels_of_a_step import patched, step
from tests.ops.ahead_of_time import compiling


def main() -> None:
    from triton.runtime.jit import JITFunction

    from fastplug import devices
    from fastplug.graphs import replay
    from fastplug.ops import ahead
    from fastplug.patching.sites import KEY

    devices.interpreting = lambda: True  # so that the kernels are not refused on a CPU
    replay.possible = lambda device: ahead.possible()
    original = JITFunction._do_compile
    early, late = set[str](), set[str]()

    def compile_one(self: Any, *args: Any, **kwargs: Any) -> Any:
        op = self.fn.__module__.split(".")[-2]
        (early if ahead.going() else late).add(f"{op}.{self.fn.__name__}")
        return original(self, *args, **kwargs)

    JITFunction._do_compile = compile_one
    for kind in sys.argv[1].split(","):
        model = patched(kind)
        for layer in model.get_base_model().model.layers:
            layer.train()
        early.clear()
        late.clear()
        with compiling(90):
            step(model, 64)
        state = model.get_base_model().model.layers[0].__dict__[KEY].runtime.graphs
        found = {"early": sorted(early), "late": sorted(late), "kinds": len(state.compiled)}
        print(json.dumps({"kind": kind, **found}), flush=True)


if __name__ == "__main__":
    main()
