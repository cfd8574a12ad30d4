"""``python -m benchmarks.verifying`` verifies whole models of the measured shapes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import verifying

pytest.importorskip("peft")


@pytest.mark.parametrize("row", ["lora:2x32", "qlora:2x32"])
def test_a_small_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "verify.json"
    command = ["verifying", "--shapes", "tiny", "--row", row, "--systems", "fastplug+graphs=off", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    assert verifying.main() == 0
    (result,) = json.loads(out.read_text())["results"]
    assert result["ok"]
    assert not result["dead"]
    assert result["comparisons"] > 2 * 14  # 14 adapters' gradients, two layers and the head
    assert 0.0 < result["median_ratio"] <= 2.0


def test_a_mismatch_is_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"shape": "tiny", "ok": False, "dead": 0}
    monkeypatch.setattr(verifying, "verified", lambda *args: found)
    monkeypatch.setattr(sys, "argv", ["verifying", "--shapes", "tiny", "--row", "lora:2x32"])
    assert verifying.main() == 1
