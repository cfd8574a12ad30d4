"""Budgets of models that are sharded, or will be: what lies in this process counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastplug
from fastplug import OptionError
from fastplug.memory.meter import local_bytes
from fastplug.optimizers import OptimizerInBackward
from tests import models
from tests.memory.device import ON_A_CPU

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_a_rank_of_eight_counts_its_own_part(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.memory.eight_ranks", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, env=ON_A_CPU, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["local"] == pytest.approx(found["whole"] / 8, rel=0.02)
    assert "the weights of FSDPLlamaForCausalLM alone take" in found["refused"]
    # The states that an AdamW would have, of the parameters as they are in the first layer's forward: it is gathered.
    assert 2 * found["local"] < found["assumed"] < found["whole"]
    assert found["gradients"][1:-1] == pytest.approx([1 / 8] * 6, rel=0.02)


@pytest.mark.parametrize("later", ["a GPU", "several processes"])
def test_weights_that_will_move_are_not_refused(later: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer's callbacks apply in its constructor, before it shards the model or moves it."""
    model = models.plain()
    with pytest.raises(OptionError, match="alone take"):
        fastplug.apply(model, memory="100KiB")
    if later == "a GPU":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    else:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    fastplug.apply(model, memory="100KiB")
    monkeypatch.undo()
    with pytest.raises(OptionError, match="what is there before the first step is"):
        model(**models.batch())


def test_a_gradient_that_was_used_takes_no_memory() -> None:
    linear = nn.Linear(4, 4, bias=False)
    optimizer = OptimizerInBackward(torch.optim.SGD(linear.parameters(), lr=0.1))
    linear(torch.ones(1, 4)).sum().backward()
    assert linear.weight.grad is not None
    assert local_bytes(linear.weight.grad) == 0
    assert local_bytes(linear.weight) == 64
    optimizer.step()
