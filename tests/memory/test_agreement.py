"""Ranks plan from the same numbers, and none waits for another that does not come."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from fastplug.memory import agreement
from tests.memory.device import ON_A_CPU

pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]


def test_ranks_agree_at_powers_of_two() -> None:
    assert [n for n in range(1, 40) if agreement.due(n)] == [1, 2, 4, 8, 16, 32]


def test_a_rank_alone_agrees_with_itself() -> None:
    assert agreement.group_of(torch.nn.Linear(2, 2)) is None
    assert agreement.highest([1, -2.5], torch.device("cpu"), None) == [1.0, -2.5]


def test_the_engine_of_a_pipeline_is_no_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks have layers of their own; those of other engines agree, as the two processes below do."""
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))

    class DeepSpeedEngine:
        mpu = None

        def forward(self) -> bool:
            return agreement._deepspeed_trains()

    class PipelineEngine(DeepSpeedEngine):
        pass

    class Sliced(DeepSpeedEngine):
        mpu = "Megatron's"

    assert not agreement._deepspeed_trains()
    assert [engine().forward() for engine in (DeepSpeedEngine, PipelineEngine, Sliced)] == [True, False, False]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_ranks_follow_one_plan(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.memory.two_planners"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(tmp_path)], cwd=ROOT, text=True, env=ON_A_CPU,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank in ranks:
            said, _ = rank.communicate(timeout=240)
            assert rank.returncode == 0, said
    finally:
        for rank in ranks:
            rank.kill()
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    for strategy in ("ddp", "fsdp2", "deepspeed"):
        one, other = first[strategy]["plans"], second[strategy]["plans"]
        assert one[:4] == other[:4]  # although one rank has less memory
        assert one[0][2] <= 4 * 2**20
        for i in (4, 5):  # lengths differ, and each rank plans for its own from the same numbers
            assert one[i][0] != other[i][0]
        assert one[4][0] == other[5][0]
        assert one[7] == other[7]  # the eighth forward: what ran out or is missing on one rank counts for both
        assert one[8] == other[8]
        assert one[7][2] < one[3][2]
        assert first[strategy]["dropped"] == 0
        assert second[strategy]["dropped"] >= 1
        assert first[strategy]["weights"] == pytest.approx(second[strategy]["weights"], rel=1e-12)
        assert first[strategy]["fallbacks"] == second[strategy]["fallbacks"] == {}
    for name, pinned in (("pinned by both", True), ("pinned by one", False)):
        assert first[name] == second[name]
        assert first[name][0] is pinned
