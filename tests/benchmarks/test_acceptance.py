"""``python -m benchmarks.acceptance``: its commands exist, and a stage that takes too long is ended."""

from __future__ import annotations

import importlib
import io
import sys
import time
from pathlib import Path

import pytest

from benchmarks import acceptance
from benchmarks.hardware import ROOT
from benchmarks.longest import parse
from benchmarks.rows import Row
from benchmarks.systems import System

COMMANDS = [command for stage in acceptance.STAGES for _, command in stage.commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_can_be_called(command: str) -> None:
    module, *rest = command.split()
    if module == "pytest":
        assert all((ROOT / word).exists() for word in rest if not word.startswith("-"))
        return
    parsed = importlib.import_module(module).arguments().parse_args(rest)
    for name in getattr(parsed, "systems", "").split(",") if module == "benchmarks.step" else ():
        System.parse(name)
    for row in getattr(parsed, "rows", None) or ():
        Row.parse(row)
    for run in getattr(parsed, "run", ()):
        if module == "benchmarks.step":
            system, _, row = run.rpartition("=")
            assert System.parse(system).refuses(Row.parse(row)) is None
        else:
            parse(run)
    for path in getattr(parsed, "oracle", ()):
        assert (ROOT / path).exists()


def test_every_stage_fits_into_one_call() -> None:
    assert all(stage.seconds <= 9 * 60 for stage in acceptance.STAGES)


def test_what_takes_too_long_is_ended_with_all_it_started() -> None:
    sleeper = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    child = f"import subprocess, sys; print('begun', flush=True); subprocess.run({sleeper})"
    log, began = io.StringIO(), time.monotonic()
    assert acceptance.run([sys.executable, "-c", child], 3.0, log) == "out of time"
    assert time.monotonic() - began < 30
    assert "begun" in log.getvalue()
    assert acceptance.run([sys.executable, "-c", "raise SystemExit(3)"], 60.0, log) == "failed (3)"
    assert acceptance.run([sys.executable, "-c", ""], 60.0, log) == "ok"


def test_what_does_not_fit_is_not_begun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["acceptance", "--minutes", "0.5", "--out", str(tmp_path)])
    assert acceptance.main() == 0
    said = capsys.readouterr().out
    assert said.count("not begun") == len(COMMANDS)
    assert "not begun" in (tmp_path / "log.txt").read_text()
