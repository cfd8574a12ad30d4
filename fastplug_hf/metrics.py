"""Tokens per second and peak memory of a training run, without a sync per step."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from torch import nn

TOKENS_PER_SECOND = "fastplug/tokens_per_second"
PEAK_MEMORY = "fastplug/peak_memory_gib"


class TokenCounter:
    """A forward pre-hook that counts the unpadded tokens of training batches.

    It sits on the outermost model, so it runs once per micro-batch and not again where gradient checkpointing
    recomputes the layers. The counts stay on the device until :meth:`take`.
    """

    def __init__(self) -> None:
        self._known = 0
        self._on_device: dict[torch.device, torch.Tensor] = {}

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):  # evaluation, generation, a reference model's pass
            return
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:  # [B, S], 0 at padding
            self._on_device[mask.device] = self._on_device.get(mask.device, 0) + mask.detach().sum()
            return
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds", args[0] if args else None)
        if isinstance(tokens, torch.Tensor) and tokens.dim() >= 2:  # packed or padding-free: every token is real
            self._known += tokens.shape[:2].numel()

    def take(self) -> int:
        """The number of tokens since the last call. Waits for the device."""
        count = self._known + sum(int(part) for part in self._on_device.values())
        self._known, self._on_device = 0, {}
        return count

    def __reduce__(self) -> Any:
        # A model saved whole in mid-training must load where fastplug is not installed; this does nothing.
        return getattr, (contextlib.nullcontext(), "__exit__")


class Meter:
    """Measures one training run: tokens over the time spent training, and the highest memory mark seen."""

    def __init__(self) -> None:
        self._counter = TokenCounter()
        self._handle: Any = None
        self._seconds = 0.0
        self._mark: float | None = None
        self._peak = 0.0

    @property
    def running(self) -> bool:
        return self._handle is not None

    def start(self, model: nn.Module) -> None:
        self.stop()
        self.__init__()  # type: ignore[misc]
        self._handle = model.register_forward_pre_hook(self._counter, with_kwargs=True)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def step_begin(self) -> None:
        if self._mark is None:  # the first step, or the first after a pause: what came before was not training
            self._mark = time.perf_counter()

    def tick(self) -> None:
        """Count the time up to now as training time."""
        if self._mark is not None:
            now = time.perf_counter()
            self._seconds += now - self._mark
            self._mark = now

    def pause(self) -> None:
        """Forget the time since the last tick: an evaluation or a save."""
        self._mark = None

    def read(self, device: torch.device, replicas: int = 1) -> dict[str, float]:
        """The two metrics since the last read, over all ranks; for when the host has just waited for the device.

        Args:
            device: The device that this rank trains on.
            replicas: How many ranks see the same tokens (tensor parallelism).
        """
        tokens, peak = float(self._counter.take()), peak_memory_gib(device)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            # Every rank logs at the same step: the Trainer gathers its loss just before.
            total, highest = (torch.tensor(x, dtype=torch.float64, device=device) for x in (tokens, peak or 0.0))
            torch.distributed.all_reduce(total)
            torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
            tokens, peak = total.item() / replicas, highest.item() or None
        self.tick()
        seconds, self._seconds = self._seconds, 0.0
        metrics = {}
        if seconds > 0:
            metrics[TOKENS_PER_SECOND] = tokens / seconds
        if peak is not None:
            self._peak = max(self._peak, peak)  # outlives a reset of the counters by somebody else
            metrics[PEAK_MEMORY] = self._peak
        return metrics


def peak_memory_gib(device: torch.device) -> float | None:
    """GiB: the highest allocation on the accelerator, or on a CPU the process's highest resident set, where known.

    Only reads counters that somebody else may be using; resets none.
    """
    if device.type in ("cuda", "xpu"):
        return float(getattr(torch, device.type).max_memory_allocated(device)) / 2**30
    if device.type != "cpu":
        return None
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
