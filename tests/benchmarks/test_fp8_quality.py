"""What the FP8 quality benchmark makes of its runs, and a small one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fp8_quality import compared, join
from tests import models
from tests.exporters.texts import tokenizer


def run(kind: str, seed: int, end: float) -> dict[str, object]:
    return {"kind": kind, "seed": seed, "evaluated": end}


def test_a_kind_is_compared_with_the_exact_run_of_its_seed() -> None:
    ends = [run("exact", 0, 2.0), run("fp8", 0, 2.003), run("exact", 1, 2.01), run("fp8", 1, 2.011), run("fp8", 2, 9.0)]
    found = compared({str(i): one for i, one in enumerate(ends)})
    assert found == {
        "exact": {"mean": 2.005, "deviation": 0.00707, "range": 0.01},
        "fp8": {"mean_difference": 0.002, "largest": 0.003, "standard_error": 0.001},
    }
    assert compared({"one": run("exact", 0, 2.0)}) == {}


def test_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    made = tokenizer()
    models.plain(vocab_size=len(made)).save_pretrained(folder)
    made.save_pretrained(folder)
    out, text = tmp_path / "fp8.json", tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.fp8_quality", "--model", str(folder), "--text", str(text)]
    command += ["--steps", "2", "--batch", "2", "--length", "16", "--seeds", "1", "--device", "cpu", "--checkpointed"]
    subprocess.run([*command, "--out", str(out)], check=True)
    record = json.loads(out.read_text(encoding="utf-8"))
    assert list(record["results"]) == ["exact, seed 0", "fp8_backward, seed 0", "fp8, seed 0"]
    assert record["checkpointed"]
    assert set(record["compared"]) == {"fp8_backward", "fp8"}
    for result in record["results"].values():
        assert len(result["losses"]) == 2
        assert result["cosines"]["1"]["median"] > 0.9


def test_files_of_one_setting_are_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for seed, ends in enumerate([(2.0, 2.003), (2.01, 2.011)]):
        runs = [{**run(kind, seed, end), "losses": [3.0]} for kind, end in zip(("exact", "fp8"), ends)]
        record = {"steps": 1, "compared": {}, "results": {f"{one['kind']}, seed {seed}": one for one in runs}}
        files.append(tmp_path / f"{seed}.json")
        files[-1].write_text(json.dumps(record))
    join(files, tmp_path / "joined.json")
    record = json.loads((tmp_path / "joined.json").read_text())
    assert list(record["results"]) == ["exact, seed 0", "fp8, seed 0", "exact, seed 1", "fp8, seed 1"]
    assert record["compared"]["fp8"]["mean_difference"] == 0.002
    assert json.loads(capsys.readouterr().out) == record["compared"]
    files[1].write_text(json.dumps({**json.loads(files[1].read_text()), "steps": 2}))
    with pytest.raises(SystemExit, match="another setting"):
        join(files, None)
