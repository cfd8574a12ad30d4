"""``benchmarks.loading``: real processes on a tiny model, and what it makes of their figures."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import loading

pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[2]


def test_the_command(tmp_path: Path) -> None:
    folder, out = tmp_path / "tiny", tmp_path / "loading.json"
    words = f"--shape tiny --rounds 1 --device cpu --folder {folder} --out {out}".split()
    command = [sys.executable, "-m", "benchmarks.loading", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the same bits: yes" in done.stdout
    record = json.loads(out.read_text())
    theirs, mine = record["results"]
    assert (theirs["loader"], mine["loader"]) == ("transformers", "fastplug")
    assert all(r["seconds"] > 0 and r["samples"] > 0 and r["host_gib"] >= 0 for r in record["results"])
    assert theirs["size_gib"] == mine["size_gib"]
    assert {"model.layers.1.mlp.down_proj.nested_absmax", "model.norm.weight"} <= set(record["compared"])
    assert len(list(folder.glob("*.safetensors"))) == 8  # what it was given as a folder stays
    assert record["stored_bytes"] == loading.warm(folder)
    with pytest.raises(SystemExit, match="num_hidden_layers is 2, not 3"):
        loading.check_folder(folder, "tiny", 3)


HOLD = """
import sys, time, mmap
held = bytearray(b"x" * (40 << 20))
print("held", flush=True)
sys.stdin.readline()
held += b"y" * (60 << 20)
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    sum(mapped[i] for i in range(0, len(mapped), 4096))
    print("more", flush=True)
    sys.stdin.readline()
"""


def test_pages_of_files_are_not_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"z" * (80 << 20))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "file")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdout.readline()
        watch = loading.Peak(process.pid)
        if watch.first is None:
            pytest.skip("this system does not tell anonymous memory apart")
        assert watch.first > 40 << 20  # what was there before is the level from which it counts
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        time.sleep(0.05)
        rise = watch.end()
    finally:
        process.kill()
        process.communicate()
    assert rise is not None
    assert 55 << 20 < rise < 175 << 20  # the larger array and, while it grows, the old one; not the file


def test_a_load_that_fails_says_why(tmp_path: Path) -> None:
    result = loading.measured("fastplug", tmp_path / "nothing", "cpu", "tiny", 60.0)
    assert "neither a folder nor a model in the local cache" in result["error"]
    assert loading.table([result], 1)[1].startswith("  fastplug       failed: ")


def result(loader: str, **changes: Any) -> dict[str, Any]:
    row = {"loader": loader, "seconds": 4.0, "size_gib": 5.5, "device_gib": 6.0, "host_gib": 0.4,
           "digests": {"a.weight": "1", "a.absmax": "2"}}  # fmt: skip
    return {**row, **changes}


def test_verdicts() -> None:
    results = [result("transformers", seconds=9.0), result("fastplug"), result("transformers", seconds=8.0),
               result("fastplug", seconds=5.0, device_gib=6.6)]  # fmt: skip
    assert loading.compared(results) == []
    assert loading.verdicts(results, []) == [
        "fastplug takes 0.50 of the time of transformers",
        "the same bits: yes",
        "fastplug's peak on the device: +1.10 GiB from the quantized size, BEYOND 1",
        "fastplug's peak on the host: -5.10 GiB from the quantized size, within 1",
    ]
    results[3] = result("fastplug", digests={"a.weight": "1", "a.absmax": "3"})
    assert loading.compared(results) == ["a.absmax"]
    assert "the same bits: NO: a.absmax" in loading.verdicts(results, loading.compared(results))
    results[3] = result("fastplug", digests={"a.weight": "1"})
    assert loading.compared(results) == ["a.absmax"]
    alone = [{"loader": "transformers", "error": "no"}, result("fastplug", device_gib=None, host_gib=None)]
    assert loading.verdicts(alone, []) == ["transformers failed: no"]
