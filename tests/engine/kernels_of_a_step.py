"""Which kernels training steps of changing lengths compile, on a GPU that is not there.

    python -m tests.engine.kernels_of_a_step lora,qlora 64 61 33

Prints a line of JSON for each step: the names of the kernels that had not been compiled before. The model lies on the
CPU, is patched with the Triton kernels, and nothing that they should compute is computed
(see ``tests.ops.ahead_of_time``).
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from tests import models
from tests.ops.ahead_of_time import compiling


def step(model: Any, length: int) -> None:
    tokens = torch.randint(3, models.VOCABULARY, (2, length))
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.zero_grad(set_to_none=True)


def patched(kind: str) -> Any:
    import fastplug

    plain = models.plain("qwen3", hidden_size=128, intermediate_size=256).to(torch.bfloat16)
    model = models.lora(models.quantized(plain, compute_dtype=torch.bfloat16) if kind == "qlora" else plain)
    fastplug.apply(model, strict=True, kernels="triton", graphs="off")
    return model


def main() -> None:
    import fastplug
    from fastplug import devices

    devices.interpreting = lambda: True  # so that the kernels are not refused on a CPU
    kinds, *lengths = sys.argv[1:]
    for kind in kinds.split(","):
        model, seen = patched(kind), set[str]()
        with compiling(90) as compiled:
            for length in map(int, lengths):
                step(model, length)
                new = {kernel.hash: name for name, kernel in compiled if kernel.hash not in seen}
                seen |= set(new)
                compiled.clear()
                print(json.dumps({"kind": kind, "length": length, "new": sorted(new.values())}), flush=True)
        fallbacks = fastplug.report(model).fallbacks
        assert not fallbacks, fallbacks


if __name__ == "__main__":
    main()
