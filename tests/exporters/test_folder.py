from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastplug.exporters import ExportError, folder
from fastplug.exporters.folder import atomic_folder, list_files, verify_manifest, write_manifest
from fastplug.exporters.safetensors_stream import SafetensorsWriter, TensorSpec, file_order


def test_the_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep/er/out") as partial:
        assert not (tmp_path / "deep/er/out").exists()
        (partial / "config.json").write_text("{}")
        (partial / "sub").mkdir()
        (partial / "sub/file").write_text("1")
    assert list_files(tmp_path / "deep/er/out") == ("config.json", "sub/file")
    assert os.listdir(tmp_path / "deep/er") == ["out"]
    mode = (tmp_path / "deep/er/out").stat().st_mode & 0o777
    assert mode == (tmp_path / "deep").stat().st_mode & 0o777  # others may read it, as the umask says


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_an_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def stopped() -> None:
        with atomic_folder(tmp_path / "out") as partial:
            (partial / "file").write_text("1")
            raise error

    with pytest.raises(type(error)) as caught:
        stopped()
    assert not list(tmp_path.iterdir())
    if isinstance(error, OSError):
        assert caught.value.errno == errno.ENOSPC  # type: ignore[attr-defined]
        assert "no space left" in str(caught.value)


def test_existing_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    for content in ("first", "second", "third"):
        if content == "third":
            monkeypatch.setattr(folder, "_exchange", lambda *_: False)
        with atomic_folder(out, overwrite=content != "first") as partial:
            (partial / "config.json").write_text(content)
            (partial / content).write_text("")
        assert list_files(out) == tuple(sorted(("config.json", content)))
        assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(FileExistsError, match="overwrite=True"), atomic_folder(out):
        raise AssertionError
    with pytest.raises(ValueError, match="stop"), atomic_folder(out, overwrite=True):
        raise ValueError("stop")
    assert (out / "config.json").read_text() == "third"
    (out / "config.json").unlink()
    with pytest.raises(FileExistsError, match="neither a model nor an adapter"), atomic_folder(out, overwrite=True):
        raise AssertionError
    with pytest.raises(FileExistsError, match="not a folder"), atomic_folder(out / "third", overwrite=True):
        raise AssertionError
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as partial:
        (partial / "file").write_text("1")
    assert list_files(tmp_path / "empty") == ("file",)


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def race() -> None:
        with atomic_folder(out) as partial:
            (partial / "file").write_text("mine")
            out.mkdir()
            (out / "file").write_text("theirs")

    with pytest.raises(FileExistsError, match="overwrite=True"):
        race()
    assert (out / "file").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["out"]


def test_a_read_only_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)  # the tests may run as root, to whom nothing is read-only
    with pytest.raises(PermissionError, match=r"cannot write into .* choose a writable folder"):
        atomic_folder(tmp_path / "out").__enter__()


KILLED = """
import os, sys, time
from fastplug.exporters.folder import atomic_folder
with atomic_folder(sys.argv[1], overwrite=True) as partial:
    (partial / "config.json").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("existing", [False, True])
def test_kill_leaves_nothing_under_the_final_name(tmp_path: Path, existing: bool, caplog: Any) -> None:
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "config.json").write_text("whole")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert out.exists() == existing
    if existing:
        assert (out / "config.json").read_text() == "whole"
    with atomic_folder(out, overwrite=True) as partial:
        (partial / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "new"
    assert "was left by an export that was killed" in caplog.text


def test_manifest_finds_one_flipped_byte(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0" * 5_000_000)
    (tmp_path / "b").write_bytes(b"1")
    write_manifest(tmp_path, {"b": hashlib.sha256(b"1").hexdigest()})
    assert verify_manifest(tmp_path) == ()
    with open(tmp_path / "a", "r+b") as stream:
        stream.seek(4_999_999)
        stream.write(b"1")
    (tmp_path / "b").unlink()
    assert verify_manifest(tmp_path) == ("a", "b")
    (tmp_path / "SHA256SUMS").write_text("0  ../x\n")
    with pytest.raises(ExportError, match="outside of the folder"):
        verify_manifest(tmp_path)
    with pytest.raises(ExportError, match="no SHA256SUMS"):
        verify_manifest(tmp_path / "none")


TENSORS = {
    "b.odd": torch.randn(3, 5).bfloat16(),
    "a.transposed": torch.randn(4, 6).T,
    "c.scalar": torch.tensor(3),
    "d.empty": torch.zeros(0, 4),
    "e.bool": torch.tensor([True, False, True]),
    "f.half": torch.randn(7).half(),
    "g.slice": torch.randn(8, 8)[1::2, ::3],
    'h.ünï"code\\': torch.arange(5, dtype=torch.uint8),
}


def test_stream_is_what_the_library_writes(tmp_path: Path) -> None:
    order = file_order([TensorSpec(name, tuple(t.shape), t.dtype) for name, t in TENSORS.items()])
    with SafetensorsWriter(tmp_path / "ours.safetensors", order, {"format": "pt"}) as writer:
        for spec in order:
            writer.write(spec.name, TENSORS[spec.name])
    found = load_file(tmp_path / "ours.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    save_file({name: t.contiguous() for name, t in found.items()}, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert os.path.getsize(tmp_path / "ours.safetensors") == os.path.getsize(tmp_path / "theirs.safetensors")
    assert writer.sha256 == hashlib.sha256((tmp_path / "ours.safetensors").read_bytes()).hexdigest()


def test_stream_refuses_what_was_not_planned(tmp_path: Path) -> None:
    spec = TensorSpec("a", (2,), torch.float32)
    for wrong in (torch.zeros(3), torch.zeros(2).half()):
        with (
            pytest.raises(ExportError, match="was planned"),
            SafetensorsWriter(tmp_path / f"{wrong.dtype}", [spec]) as out,
        ):
            out.write("a", wrong)
    with pytest.raises(ExportError, match="lacks 1 planned"), SafetensorsWriter(tmp_path / "short", [spec]):
        pass
    with pytest.raises(ExportError, match="does not know"):
        SafetensorsWriter(tmp_path / "x", [TensorSpec("a", (2,), torch.complex64)])
