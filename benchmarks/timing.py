"""Milliseconds of a kernel, without the time that Python takes to launch it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

TOTAL = 4.0  # ms of one replay: long against the replay's own launch
REPLAYS = 7


def milliseconds(calls: Sequence[Callable[[], Any]], *, capture: bool = True) -> float:
    """Median time of one call over replays of a CUDA graph that goes through ``calls`` again and again.

    The calls do the same work on different tensors, enough of them that no cache holds what the next one reads.
    ``capture=False`` is for functions that wait for the GPU and cannot be recorded: their launches are hidden behind
    a busy GPU as far as that goes. Without a GPU it is wall time.
    """
    for call in calls:
        call()
    if not torch.cuda.is_available():
        return statistics.median(_wall(call) for call in calls)
    torch.cuda.synchronize()
    if not capture:
        return statistics.median(_event(lambda c=c: c(), sleep=True) for c in [*calls] * 3)  # type: ignore[misc]
    once = max(_event(calls[0], sleep=True), 1e-3)
    rounds = max(1, math.ceil(TOTAL / (once * len(calls))))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times = [_event(graph.replay, sleep=False) for _ in range(REPLAYS)]
    return statistics.median(times) / (rounds * len(calls))


def _event(call: Callable[[], Any], sleep: bool) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if sleep:
        torch.cuda._sleep(2_000_000)  # about a millisecond, in which the launches are queued
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _wall(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


def copy_bandwidth(device: torch.device, size: int) -> float:
    """TB/s of a copy on the device, bytes read plus bytes written."""
    buffers = [torch.randint(0, 255, (size,), device=device, dtype=torch.uint8) for _ in range(4)]
    pairs = list(zip(buffers[::2], buffers[1::2]))
    return 2 * size / milliseconds([lambda a=a, b=b: b.copy_(a) for a, b in pairs]) / 1e9  # type: ignore[misc]


def matmul_rate(device: torch.device, n: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """TFLOP/s of a product of two n x n matrices of random numbers (zeros run faster than data will)."""
    a, b, out = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))
    return 2 * n**3 / milliseconds([lambda: torch.mm(a, b, out=out)]) / 1e9
