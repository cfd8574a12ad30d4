"""Ranks that decided otherwise stop, all of them, with the site's name; equal ones go on."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fastplug.errors import FastPlugError
from fastplug.patching.report import Decision
from fastplug_axolotl.ranks import is_true_on_any, require_same_decisions

PATCHED = Decision("mlp", "layers.0.mlp", "LlamaMLP", "llama", "patched", "fused gated MLP")
REFUSED = Decision("mlp", "layers.0.mlp", "LlamaMLP", "llama", "refused", reason="no kernel for cuda:1")
ELSEWHERE = Decision("mlp", "layers.0.mlp", "LlamaMLP", "llama", "refused", reason="no kernel for cuda:0")


def rank(number: int, store: str, cases: list[list[list[Decision]]], results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    said = [str(is_true_on_any(number == 1)), str(is_true_on_any(False))]
    for case in cases:
        try:
            require_same_decisions(case[number])
            said.append("")
        except FastPlugError as error:
            said.append(str(error))
    results.put(said)
    dist.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_ranks(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    cases = [[[PATCHED], [PATCHED]], [[REFUSED], [ELSEWHERE]], [[PATCHED], [REFUSED]], [[PATCHED], []]]
    workers = [context.Process(target=rank, args=(i, str(tmp_path / "store"), cases, results)) for i in (0, 1)]
    for worker in workers:
        worker.start()
    first, second = (results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert first == second
    assert first[:4] == ["True", "False", "", ""]
    assert first[4] == (
        "fastplug: rank 1 decided layers.0.mlp: refused (no kernel for cuda:1), but rank 0 layers.0.mlp: patched "
        "(fused gated MLP); use the same packages and the same kind of device on all ranks"
    )
    assert "rank 1 decided nothing on this site" in first[5]


def test_one_process_compares_nothing() -> None:
    require_same_decisions([PATCHED])
    assert is_true_on_any(True)
    assert not is_true_on_any(False)
