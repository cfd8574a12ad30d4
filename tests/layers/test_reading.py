"""Reading tensors from files through buffers that are filled ahead."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastplug.errors import ModelError
from fastplug.layers import load, reading
from fastplug.layers.reading import Reader, header_of, metadata_of
from tests import models

SIZES = (10, 1, 300, 0, 64, 7, 1000, 3)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(reading, "_CHUNK", 64)
    tensors = {f"t{i}": torch.randint(0, 255, (size,), dtype=torch.uint8) for i, size in enumerate(SIZES)}
    tensors["floats"] = torch.randn(5, 17, dtype=torch.float32)
    tensors["scalar"] = torch.tensor(3.5, dtype=torch.bfloat16)
    tensors["exponents"] = torch.arange(9, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "more": "text"})
    return tmp_path / "model.safetensors"


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The parts that were read: first byte and number of bytes."""
    found: list[tuple[int, int]] = []
    real, lock = reading._fill, threading.Lock()

    def fill(stored: Any, start: int, target: torch.Tensor) -> None:
        with lock:
            found.append((stored.start + start, len(target)))
        real(stored, start, target)

    monkeypatch.setattr(reading, "_fill", fill)
    return found


def expected(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.cpu(), b.cpu()
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("buffered", [True, False])
def test_in_order_every_byte_is_read_once(file: Path, parts: list[Any], buffered: bool, device: torch.device) -> None:
    given, truth = header_of(file), expected(file)
    with Reader(device, given.values(), buffered=buffered or device.type != "cpu") as reader:
        for name, stored in given.items():
            assert same(reader.read(stored), truth[name]), name
    assert sum(size for _, size in parts) == sum(stored.size for stored in given.values())
    assert len(set(parts)) == len(parts)
    assert max(size for _, size in parts) <= 64


def test_what_comes_next_is_read_while_the_device_works(file: Path, parts: list[Any], device: torch.device) -> None:
    given = list(header_of(file).values())
    with Reader(device, given, buffered=True) as reader:
        first = next(stored for stored in given if stored.size)
        reader.read(first)
        reader._pool.shutdown(wait=True)
        ahead = {start for start, _ in parts} - set(range(first.start, first.start + first.size))
        waiting = 1 if device.type == "cpu" else reading._BUFFERS // 2  # whose copies to a GPU are not done
        assert len(ahead) >= reading._BUFFERS - waiting
        assert len(parts) <= -(-first.size // 64) + reading._BUFFERS  # and never more than there are buffers


@pytest.mark.parametrize("step", [2, 3, 5, 7, 10])
def test_another_order_than_was_said(file: Path, step: int, device: torch.device) -> None:
    given, truth = header_of(file), expected(file)
    names = list(given)
    with Reader(device, given.values(), buffered=True) as reader:
        for i in range(3 * len(names)):  # some twice, some skipped for a while
            name = names[i * step % len(names)]
            assert same(reader.read(given[name]), truth[name]), name
    with Reader(device, buffered=True) as reader:
        assert all(same(reader.read(given[name]), truth[name]) for name in reversed(names))


def test_a_file_that_ends_too_early(file: Path, device: torch.device) -> None:
    given = header_of(file)
    file.write_bytes(file.read_bytes()[:-700])
    with Reader(device, given.values(), buffered=True) as reader, pytest.raises(ModelError, match="ends too early"):
        list(map(reader.read, given.values()))


def test_texts_in_the_header(file: Path, tmp_path: Path) -> None:
    assert metadata_of(file) == {"format": "pt", "more": "text"}
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    assert metadata_of(tmp_path / "plain.safetensors") == {}
    with pytest.raises(ModelError, match="there is no file"):
        metadata_of(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("quant", ["nf4", None])
def test_a_model_is_read_in_the_order_that_was_said(
    tmp_path: Path, parts: list[Any], monkeypatch: pytest.MonkeyPatch, quant: str | None
) -> None:
    """Through buffers, whole and quantized, with tensors over several files: nothing is read twice."""
    pytest.importorskip("transformers")
    from fastplug.layers import save
    from fastplug.layers.filling import Reader as Used

    models.plain("qwen2").to(torch.bfloat16).save_pretrained(tmp_path / "plain", max_shard_size="60KB")
    expected = load(tmp_path / "plain", "nf4", device="cpu")
    folder = tmp_path / "plain"
    if quant is None:  # weights in 4 bits, whose parts are many
        folder = save(expected, tmp_path / "nf4", max_shard_size="60KB")
    monkeypatch.setattr(reading, "_CHUNK", 1000)
    monkeypatch.setattr(
        "fastplug.layers.filling.Reader", lambda device, order: Used(device, order, buffered=True)
    )  # as on a GPU
    parts.clear()
    loaded = load(folder, quant, device="cpu")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in expected.state_dict().items())
    sizes = [stored.size for file in folder.glob("*.safetensors") for stored in header_of(file).values()]
    assert sum(size for _, size in parts) == sum(sizes)
