"""What a merged export leaves behind when it is stopped, and what memory it needs."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from fastplug.exporters import writing
from fastplug.exporters.merged import merged_16bit
from fastplug.exporters.safetensors_stream import SafetensorsWriter
from tests.exporters.models import adapted, llama, read

ROOT = Path(__file__).parents[2]


def test_full_disk_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = SafetensorsWriter.write

    def full(self: SafetensorsWriter, name: str, tensor: torch.Tensor) -> None:
        if len(written) == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(name)
        write(self, name, tensor)

    model = adapted(llama())
    monkeypatch.setattr(SafetensorsWriter, "write", full)
    with pytest.raises(OSError, match="no space left") as caught:
        merged_16bit(model, tmp_path / "out", max_shard_size="20KB")
    assert caught.value.errno == errno.ENOSPC
    assert len(written) == 9
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(SafetensorsWriter, "write", None)
    with pytest.raises(OSError, match=r"takes 0\.00 GiB, but the disk of .* has only 0\.00 GiB left"):
        merged_16bit(llama(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_existing_folder(tmp_path: Path) -> None:
    model = llama()
    merged_16bit(model, tmp_path / "out", max_shard_size="20KB")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        merged_16bit(model, tmp_path / "out")
    merged_16bit(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out/model.safetensors.index.json").exists()
    assert read(tmp_path / "out").keys() == model.state_dict().keys()
    assert os.listdir(tmp_path) == ["out"]


KILLED = """
import sys, time, torch
from fastplug.exporters.merged import merged_16bit
from fastplug.exporters.safetensors_stream import SafetensorsWriter
from tests.exporters.models import adapted, llama
write, count = SafetensorsWriter.write, 0
def slow(self, name, tensor):
    global count
    write(self, name, tensor)
    count += 1
    if count == 9:
        print("writing", flush=True)
        time.sleep(60)
SafetensorsWriter.write = slow
merged_16bit(adapted(llama()), sys.argv[1])
"""


def test_kill_in_the_middle_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    left = [item.name for item in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".out.partial-")
    assert not out.exists()


MEMORY = """
import sys, torch
from fastplug.exporters.merged import merged_16bit
from tests.exporters.models import adapted, llama

def resident(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

shape = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, head_dim=192)
merged_16bit(adapted(llama()), sys.argv[1] + "/first")  # loads what is loaded once
model = adapted(llama(**shape))
before = resident("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")  # resets the high-water mark
merged_16bit(model, sys.argv[1] + "/second", verify=False)
layer = sum(p.numel() * 2 for n, p in model.named_parameters() if "layers.0." in n and "lora" not in n)
print(resident("VmHWM:") - before, layer, sum(p.numel() * 2 for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's high-water mark of memory")
def test_peak_memory_is_that_of_two_layers(tmp_path: Path) -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"}
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    process: Any = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    peak, layer, model = map(int, process.stdout.split()[-3:])
    largest = 3072 * 768 * 2
    print(f"peak {peak / 2**20:.1f} MiB, layer {layer / 2**20:.1f} MiB, model {model / 2**20:.1f} MiB")
    assert model > 10 * layer
    assert peak < 2 * layer + largest
