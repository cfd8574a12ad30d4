"""``import fastplug`` does nothing but define names: no torch, no environment variable, no time."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

import pytest

LIMIT = 0.050  # seconds

PROBE = """
import json, os, sys
before = dict(os.environ)
import fastplug
names = {name.split(".")[0] for name in sys.modules}
heavy = sorted(names & {"torch", "transformers", "peft", "triton", "numpy", "rich", "typer", "pluggy"})
print(json.dumps([heavy, os.environ == before, fastplug.__version__, sorted(dir(fastplug))]))
"""


def seconds(code: str) -> float:
    """Processor time of a new interpreter, which does not count its waiting for other programs."""
    before = os.times()
    subprocess.run([sys.executable, "-c", code], check=True)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def test_import_loads_nothing_and_changes_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True)
    heavy, same_environment, version, names = json.loads(done.stdout)
    assert heavy == []
    assert same_environment
    assert version
    assert {"apply", "undo", "report", "verify", "export", "Options"} <= set(names)


def test_import_is_fast() -> None:
    """The difference to an empty interpreter, of the medians of runs that were taken in turns."""
    seconds("import fastplug")  # writes the bytecode
    runs = [(seconds("import fastplug"), seconds("pass")) for _ in range(7)]
    with_it, without = (statistics.median(times) for times in zip(*runs, strict=True))
    assert with_it - without < LIMIT


def test_every_public_name_resolves() -> None:
    import fastplug

    for name in fastplug.__all__:
        assert getattr(fastplug, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        fastplug.aply  # noqa: B018
