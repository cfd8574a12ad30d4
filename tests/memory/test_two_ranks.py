"""Policies under DDP and FSDP2: weights are gathered again before a layer is computed again."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastplug.memory.policy import Policy
from tests.memory.device import ON_A_CPU

pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_all_policies_give_the_same_bits_on_two_ranks(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.memory.two_ranks"]
    pipes: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    ranks = [
        subprocess.Popen([*command, str(rank), str(port), str(tmp_path)], cwd=ROOT, text=True, env=ON_A_CPU, **pipes)  # type: ignore[call-overload]
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            said, _ = rank.communicate(timeout=300)
            assert rank.returncode == 0, said
    finally:
        for rank in ranks:
            rank.kill()
    for i in range(2):
        found = json.loads((tmp_path / f"{i}.json").read_text())
        assert found == {f"{strategy} {policy.value}": [True, []] for strategy in ("ddp", "fsdp2") for policy in Policy}
