"""``python -m benchmarks.families`` knows every row, and runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import families
from benchmarks.family_shapes import HEADLINE, SHAPES
from fastplug.families import fastplug_families


def test_every_row_has_a_shape() -> None:
    assert {row.name for row in fastplug_families()} == set(SHAPES)
    assert tuple(SHAPES)[:4] == HEADLINE


def test_toy_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "families.json"
    command = [
        "families",
        "--toy",
        "--device",
        "cpu",
        "--rows",
        "granite,llama",
        "--layers",
        "1",
        "--other-layers",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--option", "graphs=off", "--out", str(out)])
    families.main()
    results = json.loads(out.read_text())["results"]
    assert [result["row"] for result in results] == ["granite", "llama"]
    for result in results:
        assert result["ratio"] > 0
        assert result["patched"]["decoder_layer"] == 1
        assert result["loss"] == pytest.approx(result["unpatched_loss"], rel=1e-5)
        assert result["gradient_cosine"] == pytest.approx(1.0, abs=1e-6)
        assert not result["error"]
    assert "unpatched" in capsys.readouterr().out


def test_without_time_it_ends_with_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["families", "--toy", "--rows", "llama", "--seconds", "-1"])
    families.main()
    assert "no time left for: llama" in capsys.readouterr().out
