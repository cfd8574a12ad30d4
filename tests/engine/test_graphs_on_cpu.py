"""The stand-in for CUDA graphs: what is held as they demand comes out right, and what is not is written over."""

from __future__ import annotations

import gc

import torch

from tests.engine.graphs_on_cpu import CPURecorder


def chain(x: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        x = x.sin() + 1
    return x


def test_a_replay_computes_what_was_recorded_from_what_is_there_now() -> None:
    recorder, x = CPURecorder(), torch.zeros(1000)
    (y,), replay = recorder.record(lambda: [chain(x, 3).view(10, 100)[2:]])
    for seed in range(3):
        x.copy_(torch.randn(1000, generator=torch.Generator().manual_seed(seed)))
        replay()
        assert torch.equal(y, chain(x, 3).view(10, 100)[2:])


def test_recording_computes_nothing_that_stays() -> None:
    recorder, x = CPURecorder(), torch.zeros(1000)
    (y,), replay = recorder.record(lambda: [chain(x, 1)])
    replay()
    before = y.clone()
    x.fill_(2)
    recorder.record(lambda: [chain(x, 3)])
    assert torch.equal(y, before)


def test_what_is_not_held_is_written_over_and_what_is_held_is_not() -> None:
    recorder, x = CPURecorder(), torch.ones(1000)
    (held,), first = recorder.record(lambda: [chain(x, 2)])
    (lent,), second = recorder.record(lambda: [chain(x, 2)])
    lent = recorder.view(lent)
    gc.collect()
    (_, _), third = recorder.record(lambda: [chain(x, 1), chain(x, 5)])
    first(), second()
    right = chain(x, 2)
    assert torch.equal(held, right)
    assert torch.equal(lent, right)
    third()
    assert torch.equal(held, right)
    assert not torch.equal(lent, right)


def test_a_piece_that_is_free_is_used_again() -> None:
    recorder, x = CPURecorder(), torch.ones(1000)
    kept, _ = recorder.record(lambda: [chain(x, 1)])
    most = recorder.arena.most
    del kept
    gc.collect()
    recorder.record(lambda: [chain(x[:900], 1)])
    assert recorder.arena.most == most
    assert len(recorder.arena.free) == 1
