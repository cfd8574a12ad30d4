"""What a user waits for: the first step with an empty compiler cache, and what later steps compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
SECONDS = 10.0  # from `apply` to the end of the first step
PROGRAM = """
import json, os, sys, time
from pathlib import Path
import torch, fastplug
from fastplug.graphs import replay
from tests.gpu.test_step import build, gradients, tokens

def kernels():
    return len(list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")))

if sys.argv[3] != "ahead":
    replay.possible = lambda device: False
model = build(sys.argv[1], sys.argv[2], layers=2, width=1024)
torch.cuda.synchronize()
before, started = kernels(), time.perf_counter()
fastplug.apply(model, strict=True, graphs="off")
gradients(model, tokens(2, 256))
torch.cuda.synchronize()
seconds, first = time.perf_counter() - started, kernels()
lengths = [255, 131, 64, 33, 300, 1]
times = []
for length in lengths:
    started = time.perf_counter()
    gradients(model, tokens(2, length))
    torch.cuda.synchronize()
    times.append(time.perf_counter() - started)
found = {"seconds": seconds, "first": first - before, "later": kernels() - first, "longest": max(times)}
print(json.dumps({**found, "times": times}))
"""


@pytest.mark.parametrize("compiled", ["ahead", "launch by launch"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_first_step_with_an_empty_cache(kind: str, family: str, compiled: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, kind, family, compiled]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(kind, family, compiled, found)
    assert found["seconds"] <= SECONDS, found
    assert 5 <= found["first"] <= 24, found
    assert found["later"] == 0, found
    assert found["longest"] < 1.0, found
