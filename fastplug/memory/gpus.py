"""What GPUs can do, for times that are estimated before anything ran.

Peaks are the manufacturers' (dense, 16-bit inputs, fp32 accumulation). How much of them is reached was measured on one
H100 (Llama-3.1-8B shape, torch 2.11): matrix products 73% at 8,192 tokens, attention 51% forward and 37% backward with
cuDNN, memory 80%. For the other GPUs these shares are reasoned, not measured: the same for data-centre cards, more of
the peak for consumer cards, whose fp32 accumulation halves it already, less where the power limit is low. A run
replaces all of it by its own measurements after a few steps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastplug.errors import OptionError
from fastplug.memory.budget import amount

GiB = 2**30


@dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    Attributes:
        name: As people write it.
        memory: Bytes that CUDA reports as the device's total.
        tflops: Peak of dense 16-bit products with fp32 accumulation, in 10^12 operations a second.
        bandwidth: Peak of the memory, in 10^9 bytes a second.
        host: Copies from and to pinned host memory, in 10^9 bytes a second each way.
        gemm, attention, attention_backward, memory_share: The shares of the peaks that are reached.
    """

    name: str
    memory: int
    tflops: float
    bandwidth: float
    host: float
    gemm: float = 0.74
    attention: float = 0.45
    attention_backward: float = 0.33
    memory_share: float = 0.8

    def gemm_ms(self, operations: float, tokens: int) -> float:
        """Milliseconds of products with ``tokens`` rows: few rows do not fill the GPU."""
        return operations / (self.tflops * self.gemm * 1e9) * (1 + 128 / max(tokens, 1))

    def copy_ms(self, size: float) -> float:
        """Milliseconds of reading and writing so many bytes."""
        return size / (self.bandwidth * self.memory_share * 1e6)

    def host_ms(self, size: float) -> float:
        """Milliseconds of copying so many bytes to the host's memory, or from there."""
        return size / (self.host * 1e6)


GPUS = (
    GPU("H100", int(79.1 * GiB), 989, 3350, 50, attention=0.51, attention_backward=0.37),
    GPU("H200", int(139.8 * GiB), 989, 4800, 50, attention=0.51, attention_backward=0.37),
    GPU("A100 80GB", int(79.1 * GiB), 312, 2039, 24, attention=0.6, attention_backward=0.5),
    GPU("A100 40GB", int(39.4 * GiB), 312, 1555, 24, attention=0.6, attention_backward=0.5),
    GPU("L40S", int(44.4 * GiB), 362, 864, 24, gemm=0.6),
    GPU("L4", int(22.0 * GiB), 121, 300, 12, gemm=0.5),
    GPU("A10", int(22.0 * GiB), 125, 600, 24, gemm=0.6),
    GPU("RTX 5090", int(31.4 * GiB), 209, 1792, 50, gemm=0.9, attention=0.7, attention_backward=0.6),
    GPU("RTX 4090", int(23.6 * GiB), 165, 1008, 24, gemm=0.9, attention=0.7, attention_backward=0.6),
    GPU("RTX 3090", int(23.6 * GiB), 71, 936, 24, gemm=0.9, attention=0.7, attention_backward=0.6),
    GPU("T4", int(14.6 * GiB), 65, 320, 12, gemm=0.4, attention=0.2, attention_backward=0.2),
)


NOISE = re.compile(r"nvidia|geforce|tesla|graphics|laptop|gpu|hbm\d?e?|sxm\d?|pcie|rtx")


def _key(name: str) -> tuple[str, str]:
    """(model, size of its memory or nothing) in a name."""
    words = [word for word in re.split(r"[\s_-]+", name.lower()) if word and not NOISE.fullmatch(word)]
    sizes = [word.replace("gib", "gb") for word in words if re.fullmatch(r"\d+gi?b", word)]
    model = "".join(word for word in words if not re.fullmatch(r"\d+gi?b", word))
    return model.removeprefix("rtx"), sizes[0] if sizes else ""


def find(name: str) -> GPU | None:
    """The GPU of a name as people or ``torch.cuda.get_device_name`` write it, or None."""
    model, size = _key(name)
    named = [gpu for gpu in GPUS if model and _key(gpu.name)[0] == model]
    return next((gpu for gpu in named if size and _key(gpu.name)[1] == size), named[0] if named else None)


def of_memory(size: int) -> GPU:
    """The GPU whose memory is nearest to ``size`` bytes; of several, the first that :data:`GPUS` names."""
    return min(GPUS, key=lambda gpu: abs(gpu.memory - size))


def parse(text: str) -> tuple[GPU, int]:
    """(GPU, budget in bytes) of ``"H100"``, ``"24GiB"`` or ``"RTX 4090: 20GiB"``.

    An amount alone stands for the GPU whose memory is nearest to it.

    Raises:
        OptionError: Neither a GPU nor an amount.
    """
    name, _, size = (part.strip() for part in text.partition(":"))
    gpu = find(name)
    if gpu is not None:
        budget = amount(size, "gpu").of(gpu.memory) if size else gpu.memory
        return gpu, budget
    known = ", ".join(gpu.name for gpu in GPUS)
    if size or not re.match(r"\d", name):
        raise OptionError(f"fastplug: gpu={text!r} is not known; an amount such as '24GiB', or one of {known}")
    found = amount(name, "gpu", f"write an amount such as '24GiB', or one of {known}")
    if found.bytes is None:
        raise OptionError(f"fastplug: gpu={text!r} has no unit; say {name}GiB if you mean that, or one of {known}")
    return of_memory(found.bytes), found.bytes


__all__ = ["GPU", "GPUS", "find", "of_memory", "parse"]
