"""``python -m benchmarks.longest`` tries one length after another until one fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import longest
from benchmarks.shapes import SHAPES
from benchmarks.smaller_card import smaller_card
from benchmarks.weights import build

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")


def measured(monkeypatch: pytest.MonkeyPatch, out: Path, *runs: str) -> list[dict[str, Any]]:
    command = ["longest", "--shape", "tiny", "--layers", "1", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, *(word for run in runs for word in ("--run", run))])
    longest.main()
    found: list[dict[str, Any]] = json.loads(out.read_text())["results"]
    return found


def test_each_length_is_a_step_that_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain, short, long = measured(monkeypatch, tmp_path / "l.json", "hf=64", "fastplug+memory=full=128,64")
    assert (plain["length"], short["length"], long["length"]) == (64, 64, 128)
    assert all(result["trains"] for result in (plain, short, long))
    assert short["loss"] == pytest.approx(plain["loss"], rel=2e-3)
    assert short["grad_norm"] == pytest.approx(plain["grad_norm"], rel=2e-2)


def test_what_a_system_dies_of_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (failed,) = measured(monkeypatch, tmp_path / "l.json", "fastplug+no_option=1=64,128")
    assert "no_option" in failed["error"]


def test_what_the_layers_left_out_would_hold() -> None:
    model = build("tiny", 1).requires_grad_(False)
    frozen = longest.missing(model, 1, 3)
    assert frozen == 2 * sum(2 * p.numel() for n, p in model.named_parameters() if ".layers." in n)
    adapter = torch.nn.Parameter(torch.zeros(10, 4))
    model.model.layers[0].adapter = adapter
    assert longest.missing(model, 1, SHAPES["tiny"][1]["num_hidden_layers"]) == frozen // 2 + 40 * (4 + longest.STATES)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="holds a GPU's memory")
def test_a_larger_gpu_as_a_smaller_card() -> None:
    free = torch.cuda.mem_get_info()[0]
    with smaller_card(8.0):
        assert abs(torch.cuda.mem_get_info()[0] - 8 * 2**30) < 64 * 2**20
    assert torch.cuda.mem_get_info()[0] > free - 64 * 2**20


@pytest.mark.skipif(torch.cuda.is_available(), reason="holds a GPU's memory")
def test_no_gpu_to_make_smaller() -> None:
    with pytest.raises(RuntimeError, match=r"cannot be made a card of 8\.0 GiB"), smaller_card(8.0):
        pass
    with smaller_card(None):
        pass
