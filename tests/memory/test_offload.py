"""Copies to the host and back: the same bytes, the memory given up in time, pieces used again, clear errors."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from fastplug.errors import HostMemoryError
from fastplug.memory import host_memory, offload
from fastplug.memory.host_memory import PIECE, HostPool, available, check_host_memory
from fastplug.memory.offload import ENOUGH, Offloader, Packed, Timed

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.bool)


def exactly(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


@pytest.fixture
def mover(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Offloader:
    monkeypatch.setattr(offload, "SMALLEST", 1)
    monkeypatch.setattr(offload, "PIECE", 1000)  # several pieces for small tensors
    monkeypatch.setattr(host_memory, "PIECE", 1000)
    return Offloader(exactly(device))


def random(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, device=device) * 3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(mover: Offloader, device: torch.device, dtype: torch.dtype) -> None:
    x = random(device, 3, 50, 17, dtype=dtype)
    truth = x.clone()
    group = mover.group()
    packed = group.pack(x)
    assert isinstance(packed, Packed)
    x.view(torch.uint8).zero_() if device.type == "cpu" else None  # the copy out is done: nothing may read x again
    group.leave()
    found = group.unpack(packed)
    assert found.data_ptr() != x.data_ptr()
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), truth.view(torch.uint8))


def test_layouts(mover: Offloader, device: torch.device) -> None:
    """Strides stay, also where rows are padded; views with wide gaps come back as what they show."""
    group = mover.group()
    base = random(device, 4, 30, 6, 8)
    views = [base.transpose(1, 2), base[:, ::3], base[:, :, 2], base.expand(2, *base.shape), base[1:]]
    views.append(random(device, 2, 1, 30, 32)[..., :30].expand(2, 4, 30, 30))  # a mask whose rows are aligned
    packed = [group.pack(view) for view in views]
    group.leave()
    for view, kept in zip(views, packed):
        assert torch.equal(group.unpack(kept), view)
    for i in (0, 3, 5):
        assert group.unpack(packed[i]).stride() == views[i].stride()


def test_the_same_memory_is_copied_once(mover: Offloader, device: torch.device) -> None:
    group = mover.group()
    x = random(device, 8, 125)
    first, second = group.pack(x), group.pack(x.view(-1))
    assert isinstance(first, Packed)
    assert isinstance(second, Packed)
    assert first.handle is second.handle
    assert mover.pool.pieces == 4
    assert torch.equal(group.unpack(second), x.view(-1))


def test_small_tensors_and_those_of_elsewhere_stay(device: torch.device) -> None:
    mover = Offloader(exactly(device))
    group = mover.group()
    small = random(device, 100)
    for tensor in (small, torch.empty(10**6, device="meta")):
        packed = group.pack(tensor)
        assert isinstance(packed, torch.Tensor)
        assert group.unpack(packed) is packed
    assert mover.host_bytes == 0


def test_two_layers_are_on_the_device_at_a_time(mover: Offloader, device: torch.device) -> None:
    """In the forward the layer that runs and the one before; in the backward the one that runs and the next."""
    values, groups, packed = [], [], []
    for _ in range(5):
        groups.append(mover.group())
        values.append(random(device, 500))
        packed.append(groups[-1].pack(values[-1]))

    def resident() -> list[int]:
        return [i for i, kept in enumerate(packed) if kept.handle.on_device is not None]  # type: ignore[union-attr]

    assert resident() == [3, 4]
    expected = [[3, 4], [2, 3], [1, 2], [0, 1], [0]]
    for i, now in zip(reversed(range(5)), expected):
        assert torch.equal(groups[i].unpack(packed[i]), values[i])
        assert resident() == now


def test_what_is_staged_is_counted(mover: Offloader, device: torch.device) -> None:
    assert mover.staged == 0
    first, second = mover.group(), mover.group()
    kept = [group.pack(random(device, 1000)) for group in (first, first, second)]
    assert mover.staged == 12000
    first.leave()
    assert mover.staged == 4000
    first.unpack(kept[0])  # the second, which comes before it in a backward, leaves
    assert mover.staged == 8000
    assert mover.clear() == 8000
    assert mover.staged == 0


def test_pieces_are_given_back_when_a_graph_is_gone(mover: Offloader, device: torch.device) -> None:
    group = mover.group()
    packed = group.pack(random(device, 1000))
    assert (mover.pool.pieces, len(mover.pool.free)) == (4, 0)
    del group, packed
    gc.collect()
    assert (mover.pool.pieces, len(mover.pool.free)) == (4, 4)
    again = mover.group()
    kept = again.pack(random(device, 300, dtype=torch.float64))
    assert isinstance(kept, Packed)
    assert (mover.pool.pieces, len(mover.pool.free)) == (4, 1)


def test_pinned_where_copies_run_beside_the_computation(device: torch.device) -> None:
    mover = Offloader(exactly(device))
    (piece,) = mover.pool.take(1)
    assert piece.is_pinned() == (device.type == "cuda")
    assert len(piece) == PIECE


class Event:
    """A moment in milliseconds, which the device has passed or not."""

    def __init__(self, at: float, passed: bool = True) -> None:
        self.at, self.passed = at, passed

    def query(self) -> bool:
        return self.passed

    def elapsed_time(self, later: Event) -> float:
        return later.at - self.at


def timed(mover: Offloader, out: bool, rate: float, count: int = ENOUGH, passed: bool = True) -> None:
    """Copies that reached ``rate``, in 10^9 bytes a second."""
    size = 2**26
    for _ in range(count):
        mover._timed.append(Timed(out, size, Event(5.0), Event(5.0 + size / (rate * 1e6), passed)))  # type: ignore[arg-type]


def test_the_rate_of_copies_is_the_median_of_the_slower_direction() -> None:
    mover = Offloader(torch.device("cpu"))
    assert mover.rate() is None
    timed(mover, True, 50.0, count=ENOUGH - 1)
    assert mover.rate() is None
    timed(mover, True, 50.0, count=2)
    timed(mover, False, 30.0, count=ENOUGH - 1)
    assert mover.rate() == pytest.approx(50.0)
    timed(mover, False, 0.3, count=1)  # something else had the bus
    assert mover.rate() == pytest.approx(30.0)
    timed(mover, True, 10.0, count=40, passed=False)
    assert mover.rate() == pytest.approx(30.0)


@pytest.mark.gpu
def test_copies_are_timed_when_asked(device: torch.device) -> None:
    mover = Offloader(exactly(device))
    for timing in (False, True):
        mover.timing = timing
        groups = [mover.group() for _ in range(ENOUGH)]
        packed = [group.pack(torch.empty(2**26, dtype=torch.uint8, device=device)) for group in groups]
        for group, kept in zip(reversed(groups), reversed(packed)):
            group.unpack(kept)
        torch.cuda.synchronize()
        rate = mover.rate()
        assert (rate is not None) == timing
    alone = host_memory.copy_rate(exactly(device))
    assert rate is not None
    assert alone is not None
    assert 0.2 * alone < rate < 1.5 * alone


def test_too_little_host_memory_is_said_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available", lambda: 3 * 2**30)
    check_host_memory(2 * 2**30)
    with pytest.raises(HostMemoryError, match=r"needs 2\.5 GiB of host memory and 3\.0 GiB are available"):
        check_host_memory(int(2.5 * 2**30))
    pool = HostPool(pinned=False)
    with pytest.raises(HostMemoryError, match=r"10\.0 GiB"):
        pool.take(10 * 2**30)
    assert (pool.pieces, pool.free) == (0, [])
    monkeypatch.setattr(host_memory, "available", lambda: None)
    check_host_memory(2**50)


def test_a_host_that_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    pool = HostPool(pinned=True)
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(HostMemoryError, match=r"no 0\.03 GiB of pinned memory.*ulimit -l"):
        pool.take(2 * PIECE)


def test_what_the_system_and_the_container_leave(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 900 kB\nMemAvailable:   800 kB\n")
    nowhere = tmp_path / "nowhere"
    assert available(meminfo, nowhere) == 800 * 1024
    (tmp_path / "memory.max").write_text("500000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\ninactive_file 50000\n")
    assert available(meminfo, tmp_path) == 150000
    (tmp_path / "memory.max").write_text("max\n")
    assert available(meminfo, tmp_path) == 800 * 1024
    old = tmp_path / "old" / "memory"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("9223372036854771712")
    (old / "memory.usage_in_bytes").write_text("5")
    (old / "memory.stat").write_text("inactive_file 0")
    assert available(meminfo, tmp_path / "old") == 800 * 1024
    assert (available() or 1) > 0
