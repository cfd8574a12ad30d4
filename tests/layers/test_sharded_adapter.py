"""``fastplug convert-adapter`` on what two processes under FSDP2 wrote: the adapter as PEFT reads it, bit for bit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastplug.cli import app
from tests import models
from tests.layers.two_ranks import adapted, train

peft = pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the checkpoints that two processes wrote together."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.layers.two_ranks", str(rank), port, str(out)], cwd=ROOT, text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank in ranks:
            said, _ = rank.communicate(timeout=300)
            assert rank.returncode == 0, said
    finally:
        for rank in ranks:
            rank.kill()
    adapted().peft_config["default"].save_pretrained(out)
    return out


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("folder", ["wrapped", "apart"])
def test_an_adapter_that_two_processes_hold(folder: str, written: Path, tmp_path: Path) -> None:
    source = written / folder
    files = {file.name.split("_")[2] for file in source.rglob("*.distcp")}
    assert files == {"0", "1"}, "one process wrote it all"
    result = CliRunner().invoke(app, ["convert-adapter", str(source), "--out", str(tmp_path / "out"), "--base", "b"])
    assert result.exit_code == 0, result.output
    assert "rank 3 with alpha 12" in result.output

    again = peft.PeftModel.from_pretrained(models.plain("qwen2"), tmp_path / "out", is_trainable=True)
    ours = {name: p for name, p in again.named_parameters() if p.requires_grad}
    gathered = {
        name.replace("_checkpoint_wrapped_module.", ""): tensor
        for name, tensor in load_file(written / "whole.safetensors").items()
    }
    assert ours.keys() == gathered.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in gathered.items())

    alone = adapted()
    before = {name: p.detach().clone() for name, p in alone.named_parameters()}
    train(alone)
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours[name], parameter, rtol=1e-4, atol=1e-6)
            assert not torch.equal(parameter, before[name]), name
