"""Tokens per second and peak memory of a training run, without a sync per step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

TOKENS_PER_SECOND = "fastplug/tokens_per_second"
PEAK_MEMORY = "fastplug/peak_memory_gib"


class Meter:
    """Measures one training run: tokens over the time spent training, and the highest memory mark seen.

    A host calls :meth:`start`, for each micro-batch :meth:`step_begin`, :meth:`count` and :meth:`tick`, :meth:`pause`
    where something else than training comes, and :meth:`read` where it logs. Counts stay on the device until then.
    """

    def __init__(self) -> None:
        self.running = False
        self._reset()

    def _reset(self) -> None:
        self._known = 0
        self._on_device: dict[torch.device, torch.Tensor] = {}
        self._seconds = 0.0
        self._mark: float | None = None
        self._peak = 0.0

    def start(self) -> None:
        self._reset()
        self.running = True

    def stop(self) -> None:
        self.running = False

    def count(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add a micro-batch: ``tokens`` [B, S] or embeddings [B, S, H]; ``mask`` [B, S] is 0 at padding."""
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            self._on_device[mask.device] = self._on_device.get(mask.device, 0) + mask.detach().sum()
        elif tokens.dim() >= 2:  # packed or padding-free: every token is real
            self._known += tokens.shape[:2].numel()

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

    def take(self) -> int:
        """The tokens of this rank since the last call. Waits for the device."""
        count = self._known + sum(int(part) for part in self._on_device.values())
        self._known, self._on_device = 0, {}
        return count

    def read(self, device: torch.device, replicas: int = 1) -> dict[str, float]:
        """The two metrics since the last read, over all ranks. Waits for the device; every rank must call it.

        Args:
            device: The device that this rank trains on.
            replicas: How many ranks see the same tokens (tensor parallelism).
        """
        tokens: float = self.take()
        peak = peak_memory_gib(device)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
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


def token_tensors(batch: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The token ids [B, S] in a batch, each with its padding mask [B, S] if there is one.

    A mapping has them under ``input_ids`` and ``attention_mask``, prefixes (``chosen_input_ids``) included; of other
    containers every member is looked into, and of bare tensors side by side the first one is taken if it is integer.
    """
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            if not isinstance(value, torch.Tensor):
                yield from token_tensors(value)
            elif isinstance(key, str) and key.endswith("input_ids"):
                yield value, batch.get(key.removesuffix("input_ids") + "attention_mask")
    elif isinstance(batch, (list, tuple)):
        bare = [item for item in batch if isinstance(item, torch.Tensor)]
        for item in (*bare[:1], *(item for item in batch if not isinstance(item, torch.Tensor))):
            yield from token_tensors(item)
    elif isinstance(batch, torch.Tensor) and batch.dim() == 2 and not batch.is_floating_point():
        yield batch, None


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
