"""Two processes train as one does: `two_gpus.py` on a CPU, a few of its runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("transformers", "peft", "accelerate", "bitsandbytes", "lightning"):
    pytest.importorskip(package)

SCRIPT = Path(__file__).with_name("two_gpus.py")
RUNS = ("hf-ddp-lora-fastplug", "hf-fsdp2-qlora-fastplug", "pl-fsdp2-lora-fastplug")
SINGLE = ("hf-single-lora-plain", "hf-single-qlora-plain", "pl-single-lora-plain")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_train_as_one_unpatched_does(tmp_path: Path) -> None:
    """DDP and FSDP2, dense and NF4 weights: sites fused, no fallbacks, all layers wrapped, all weights sharded."""
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--cpu", "--exactly", "--only", *RUNS, *SINGLE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "two_gpus.json").read_text())["runs"]
    assert set(found) == {*RUNS, *SINGLE}
    for name in RUNS:
        assert found[name]["vs_one"] < 2e-5
        assert found[name]["fallbacks"] == {}
