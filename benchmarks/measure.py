"""Measure one loaded model in one row."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.rows import Row, lengths
from benchmarks.weights import STD, device, generator

BATCHES = 4
IN_A_ROW = 5  # steps
SLOW = 1.0  # seconds of a step above which fewer are run


@dataclass(frozen=True)
class Effort:
    """How much of the GPU's time a row may take."""

    warmup: int = 4
    steps: int = 10
    seconds: float = 8.0  # of timed steps, after which the first three, if so many are asked for, still run
    profile: bool = True


def reset_adapters(model: Any) -> list[torch.nn.Parameter]:
    """Give every LoRA matrix values that depend on its name alone; returns what is trained.

    B starts at zero otherwise, which makes every gradient of A zero and proves nothing. DoRA's magnitudes lie around
    what the rows of a random matrix have as their norm.
    """
    columns = {name: p.shape[1] for name, p in model.named_parameters() if "lora_A" in name}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_" in name:
                mean, std = 0.0, 0.01 if "lora_A" in name else 0.005
                if "lora_magnitude_vector" in name:
                    mean = STD * math.sqrt(columns[name.replace("lora_magnitude_vector", "lora_A")])
                    std = 0.05 * mean
                drawn = torch.empty(p.shape, device=device(), dtype=torch.float32)
                p.copy_(drawn.normal_(mean, std, generator=generator(name.split("layers.")[-1])))
    return [p for p in model.parameters() if p.requires_grad]


class Loop:
    """The loop that all systems run: forward, backward, fused AdamW on the LoRA weights."""

    def __init__(self, model: Any, row: Row, count: int) -> None:
        self.model, self.row = model, row
        self.parameters = reset_adapters(model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=device().type == "cuda")
        random = torch.Generator(device()).manual_seed(1)
        vocabulary = model.config.vocab_size
        self.data = [
            torch.randint(4, vocabulary - 100, (row.batch, length), device=device(), generator=random)
            for length in lengths(row, count)
        ]

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        labels = x
        if self.row.prompts:
            labels = x.clone()
            labels[:, : x.shape[1] // 2] = -100
        with torch.autocast(device().type, torch.bfloat16, enabled=self.row.autocast):
            return self.model(input_ids=x, labels=labels).loss  # type: ignore[no-any-return]

    def step(self, i: int) -> torch.Tensor:
        loss = self.loss(self.data[i % len(self.data)])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def gradients(self) -> dict[str, Any]:
        """Loss and gradients of the first batch with the adapters' first values: a fast step without a gradient is
        not fast."""
        loss = self.loss(self.data[0])
        loss.backward()
        norms = torch.stack(
            [torch.zeros((), device=p.device) if p.grad is None else p.grad.float().norm() for p in self.parameters]
        )
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "loss": round(float(loss), 5),
            "grad_norm": round(float(norms.norm()), 6),
            "dead": int((norms == 0).sum()),
            "trained": len(self.parameters),
        }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gib(which: str) -> float | None:
    """``max_memory_allocated``, ``max_memory_reserved`` or ``memory_allocated`` in GiB; None without a GPU."""
    return round(getattr(torch.cuda, which)() / 2**30, 2) if torch.cuda.is_available() else None


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def milliseconds(call: Callable[[], object]) -> float:
    """Of one call that begins on an idle device, to the end of its work."""
    synchronize()
    if not torch.cuda.is_available():
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure(model: Any, row: Row, effort: Effort) -> dict[str, Any]:
    """Times, memory, losses and gradients of one row; see the two functions below."""
    reset_peak()
    return random_lengths(model, row, effort) if row.random else steady(model, row, effort)


def steady(model: Any, row: Row, effort: Effort) -> dict[str, Any]:
    """The same shape again and again, after a warm-up.

    ``ms``: median of single steps, each from an idle GPU to its end. ``running_ms``: of steps in a row without a wait
    between them. ``busy_ms``: the sum of a step's kernels. ``peak_gib``: allocated in the timed steps;
    ``first_peak_gib``: in what came before, compilation and recording included.
    """
    loop = Loop(model, row, BATCHES)
    started = time.perf_counter()
    result = loop.gradients()
    synchronize()
    result["first_s"] = round(time.perf_counter() - started, 2)
    started, fastest, losses = time.perf_counter(), math.inf, []
    for i in range(effort.warmup):
        if i >= 2 and fastest > SLOW:
            break
        before = time.perf_counter()
        losses.append(round(float(loop.step(i)), 4))
        fastest = min(fastest, time.perf_counter() - before)  # others compile, or are recorded
    result |= {"later_losses": losses, "warm_s": round(time.perf_counter() - started, 2)}
    result["first_peak_gib"] = gib("max_memory_allocated")
    gc.collect()  # all that loading left would be gone through in one of the timed steps, for some 300 ms
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    steps = min(effort.steps, max(3, int(effort.seconds / max(fastest, 1e-6))))
    times = sorted(milliseconds(lambda i=i: loop.step(i)) for i in range(steps))  # type: ignore[misc]
    median = times[len(times) // 2]
    result |= {
        "ms": round(median, 2),
        "ms_min": round(times[0], 2),
        "ms_max": round(times[-1], 2),
        "steps": steps,
        "tokens_per_s": round(row.batch * row.sequence / median * 1e3),
        "peak_gib": gib("max_memory_allocated"),
        "reserved_gib": gib("max_memory_reserved"),
    }
    if fastest < SLOW:
        result["running_ms"] = in_a_row(loop, min(steps, IN_A_ROW))
    if effort.profile and torch.cuda.is_available():
        result |= profiled(lambda: loop.step(0))
    return result


def random_lengths(model: Any, row: Row, effort: Effort) -> dict[str, Any]:
    """``effort.steps`` steps of changing lengths, timed as a whole from the first on: compiling kernels, warming up
    and recording are in ``wall_s``. Nothing waits for the GPU between steps."""
    loop = Loop(model, row, effort.steps)
    tokens = sum(x.numel() for x in loop.data)
    total = torch.zeros((), device=device())
    synchronize()
    started = time.perf_counter()
    total += loop.step(0)
    synchronize()
    first = time.perf_counter() - started
    for i in range(1, effort.steps):
        total += loop.step(i)
    synchronize()
    wall = time.perf_counter() - started
    result = {
        "wall_s": round(wall, 2),
        "first_s": round(first, 2),
        "ms": round(1e3 * wall / effort.steps, 2),
        "steps": effort.steps,
        "tokens_per_s": round(tokens / wall),
        "mean_loss": round(float(total) / effort.steps, 5),
        "peak_gib": gib("max_memory_allocated"),
        "reserved_gib": gib("max_memory_reserved"),
    }
    reset_adapters(model)
    return result | loop.gradients()


def in_a_row(loop: Loop, steps: int) -> float:
    """Milliseconds of a step of several that nobody waits for."""
    return round(milliseconds(lambda: [loop.step(i) for i in range(steps)]) / steps, 2)


def profiled(step: Callable[[], object]) -> dict[str, Any]:
    """``busy_ms`` and the 30 kernels that take longest of one step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    kernels = [e for e in profiled.key_averages() if e.self_device_time_total]
    top = sorted(kernels, key=lambda e: -e.self_device_time_total)[:30]
    return {
        "busy_ms": round(sum(e.self_device_time_total for e in kernels) / 1e3, 2),
        "kernels": [(e.key[:90], e.count, round(e.self_device_time_total / 1e3, 2)) for e in top],
    }
