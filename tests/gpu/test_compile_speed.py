"""``torch.compile`` makes a patched model no slower."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch

import fastplug
from tests.gpu.test_step import build, tokens

pytest.importorskip("peft")

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize(("rows", "length"), [(2, 256), (4, 2048)])
def test_a_compiled_step_is_not_slower(kind: str, rows: int, length: int) -> None:
    """Both patched, both without CUDA graphs (a compiled layer is not recorded), in turns: the host's speed drifts."""
    model = build(kind, layers=2, width=2048)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        fastplug.apply(one, strict=True, graphs="off")
    torch._dynamo.reset()
    compiled, x = torch.compile(twin), tokens(rows, length)

    def seconds(call: Any, owner: Any) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        call(input_ids=x, labels=x).loss.backward()
        torch.cuda.synchronize()
        owner.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    for _ in range(4):
        seconds(model, model), seconds(compiled, twin)
    pairs = [(seconds(model, model), seconds(compiled, twin)) for _ in range(15)]
    eager, faster = (sorted(times)[len(times) // 2] for times in zip(*pairs))
    print(kind, rows, length, f"eager {1e3 * eager:.1f} ms, compiled {1e3 * faster:.1f} ms")
    assert faster <= eager / 0.97, pairs
    assert not fastplug.report(twin).fallbacks
