"""What GPUs have and can do, for plans that are made before anything ran.

A card's memory is what CUDA reports of it: less than it is sold with, and not quite the same under every driver. The
table has the lowest total that errors of PyTorch name ("GPU 0 has a total capacity of 23.52 GiB"), rounded down. The
H100 is this project's own (79.18 GiB); for the others public issues and logs of 2023 to 2026 name, some of them without
the card: H200 139.72 to 139.81, A100 79.14 to 79.25 and 39.38 to 39.56, L40S 44.34 to 44.42, L4 and A10 21.95 to 22.09,
RTX 5090 31.36 to 31.47, RTX 4090 23.52 to 23.68, RTX 3090 23.55 to 23.70, T4 14.56 to 14.75.

Peaks are the manufacturers' (dense, 16-bit inputs, fp32 accumulation). How much of them is reached was measured on one
H100 (Llama-3.1-8B shape, torch 2.11): matrix products 73% at 8,192 tokens, attention 51% forward and 37% backward with
cuDNN, memory 80%. For the other GPUs these shares are reasoned, not measured: the same for data-centre cards, more of
the peak for consumer cards, whose fp32 accumulation halves it already, less where the power limit is low. A run
replaces all of it by its own measurements after a few steps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from fastplug.errors import OptionError
from fastplug.memory.budget import amount, gib

GiB = 2**30
SOLD = 1.12  # a card is sold with up to so many times the memory that CUDA reports of it


@dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    Attributes:
        name: As people write it.
        memory: Bytes that CUDA reports as the device's total: see above.
        tflops: Peak of dense 16-bit products with fp32 accumulation, in 10^12 operations a second.
        bandwidth: Peak of the memory, in 10^9 bytes a second.
        host: Copies from and to pinned host memory, in 10^9 bytes a second each way.
        gemm, attention, attention_backward, memory_share: The shares of the peaks that are reached.
        adapted_glu: Whether the kernels of ``ops/adapted_glu`` are for it.
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
    adapted_glu: bool = False

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
    GPU("H100", int(79.1 * GiB), 989, 3350, 50, attention=0.51, attention_backward=0.37, adapted_glu=True),
    GPU("H200", int(139.7 * GiB), 989, 4800, 50, attention=0.51, attention_backward=0.37, adapted_glu=True),
    GPU("A100 80GB", int(79.1 * GiB), 312, 2039, 24, attention=0.6, attention_backward=0.5),
    GPU("A100 40GB", int(39.3 * GiB), 312, 1555, 24, attention=0.6, attention_backward=0.5),
    GPU("L40S", int(44.3 * GiB), 362, 864, 24, gemm=0.6),
    GPU("L4", int(21.9 * GiB), 121, 300, 12, gemm=0.5),
    GPU("A10", int(21.9 * GiB), 125, 600, 24, gemm=0.6),
    GPU("RTX 5090", int(31.3 * GiB), 209, 1792, 50, gemm=0.9, attention=0.7, attention_backward=0.6),
    GPU("RTX 4090", int(23.5 * GiB), 165, 1008, 24, gemm=0.9, attention=0.7, attention_backward=0.6),
    GPU("RTX 3090", int(23.5 * GiB), 71, 936, 24, gemm=0.9, attention=0.7, attention_backward=0.6),
    GPU("T4", int(14.5 * GiB), 65, 320, 12, gemm=0.4, attention=0.2, attention_backward=0.2),
)
CPU = replace(GPUS[0], name="CPU", adapted_glu=False)
"""What plans on a CPU reckon with, to be tried out; its times mean nothing."""

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


class Wanted(NamedTuple):
    """What ``--gpu`` asks for.

    Attributes:
        gpu: The GPU.
        budget: Bytes of it that a process may take, the CUDA context among them.
        named: Whether the GPU was named; else it is the one whose memory is nearest to the amount.
    """

    gpu: GPU
    budget: int
    named: bool

    def says(self) -> str:
        """Where the budget comes from, for the reader."""
        name, all_of_it = self.gpu.name, gib(self.gpu.memory)
        if self.named and self.budget == self.gpu.memory:
            return f"{all_of_it}, all that CUDA reports of one {name}"
        if self.named:
            return f"{gib(self.budget)}, where CUDA reports {all_of_it} of one {name}"
        found = f"{gib(self.budget)}, taken to be free"
        if self.gpu.memory < self.budget < SOLD * self.gpu.memory:
            found += f"; CUDA reports {all_of_it} of one {name} (--gpu '{name}')"
        return found


def parse(text: str) -> Wanted:
    """The GPU and budget of ``"H100"``, ``"24GiB"`` or ``"RTX 4090: 20GiB"``.

    An amount alone is taken as it is, and stands for the GPU whose memory is nearest to it.

    Raises:
        OptionError: Neither a GPU nor an amount.
    """
    name, _, size = (part.strip() for part in text.partition(":"))
    gpu = find(name)
    if gpu is not None:
        return Wanted(gpu, amount(size, "gpu").of(gpu.memory) if size else gpu.memory, named=True)
    known = ", ".join(gpu.name for gpu in GPUS)
    if size or not re.match(r"\d", name):
        raise OptionError(f"fastplug: gpu={text!r} is not known; an amount such as '24GiB', or one of {known}")
    found = amount(name, "gpu", f"write an amount such as '24GiB', or one of {known}")
    if found.bytes is None:
        raise OptionError(f"fastplug: gpu={text!r} has no unit; say {name}GiB if you mean that, or one of {known}")
    return Wanted(of_memory(found.bytes), found.bytes, named=False)


__all__ = ["CPU", "GPU", "GPUS", "Wanted", "find", "of_memory", "parse"]
