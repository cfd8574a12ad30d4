"""How large the programs of the kernels are on each GPU: one table, so that nothing is tried out at run time.

All kernels but the matrix products move bytes, and are as fast as the memory if enough bytes are on their way at any
time. By Little's law that is bandwidth times latency: an H100 moves 3350 GB/s, a load takes about 700 ns, so 2.3 MB
must be in flight, 17.8 kB on each of its 132 multiprocessors (:meth:`Chip.in_flight`). A multiprocessor has 64 Ki
registers of 4 bytes, so at 40 registers 1536 threads of a kernel are resident at once; with two 16-byte accesses each
they ask for 49 kB. The 2 that H100s were measured with (within a few percent of a copy) is enough on every chip of the
table, a B200 with its 38 kB included, and one access would not be on the faster ones. So the elements of a thread are
the same everywhere, and what differs is how many warps make a program:

* A program that walks over a row of logits reads it twice where a gradient is wanted. Few rows at a time, each by many
  warps, leave the second reading to the L2 cache: with 32 warps an H100 has 132 rows of 256 kB in work, 34 of its 50
  MB, and an A100 27 of 40. On a B200 one such program has too few bytes in flight; three of 16 warps have enough, and
  its L2 cache holds their 114 MB. Where a multiprocessor has room for 1536 threads, 32 warps would leave a third of it
  empty, and on the 1024 threads of sm_75 nothing would run while the program waits at its end: 16 there, too.
* A program that keeps a partial sum stays for many tiles: as many as are resident at once and no more, 1024 threads a
  multiprocessor in programs of eight warps.

Shared memory limits none of them: reductions take a few hundred bytes, a transposed tile 8 KiB, against 64 KiB for a
program on sm_75 and 99 on sm_86, sm_89 and sm_120. ``tests/ops/test_launch_table.py`` compiles every kernel for every
chip and holds registers and shared memory to this.

Measured: sm_90. Reasoned as above: the others.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

LATENCY = 700e-9  # seconds from a load to its data, under load
REGISTERS = 65536  # 4-byte registers of a multiprocessor, on all chips of the table
WARP = 32
ACCESS = 16  # bytes of the widest access of a thread


@dataclass(frozen=True)
class Chip:
    """A GPU of an architecture, its fastest where there are several.

    Attributes:
        name: Which.
        multiprocessors: How many.
        threads: That a multiprocessor holds at once.
        shared: KiB of shared memory that a program may have.
        bandwidth: GB/s of its memory.
        l2: MB of its L2 cache.
    """

    name: str
    multiprocessors: int
    threads: int
    shared: int
    bandwidth: float
    l2: int

    def in_flight(self) -> float:
        """Bytes that each multiprocessor must have on their way, by Little's law."""
        return self.bandwidth * 1e9 * LATENCY / self.multiprocessors


@dataclass(frozen=True)
class Config:
    """What the launchers ask for.

    Attributes:
        accesses: 16-byte accesses to each tensor that a thread makes before it computes.
        logits_warps: Most warps of a program that walks over a row of logits.
        persistent: Programs of a multiprocessor where each keeps a partial sum.
        decoded: Elements of a weight that a program of four warps decodes: 32 a thread, which for 4 bits are one
            16-byte load and four 16-byte stores.
    """

    accesses: int = 2
    logits_warps: int = 16
    persistent: int = 4
    decoded: int = 4096

    def per_warp(self, itemsize: int) -> int:
        """Elements of one warp, of tensors with elements of ``itemsize`` bytes (8-byte ones as if they had 4)."""
        return WARP * self.accesses * ACCESS // min(max(itemsize, 2), 4)


CHIPS = {
    75: Chip("Tesla T4", 40, 1024, 64, 320, 4),
    80: Chip("A100 80GB", 108, 2048, 163, 2039, 40),
    86: Chip("RTX 3090", 82, 1536, 99, 936, 6),
    89: Chip("RTX 4090", 128, 1536, 99, 1008, 72),
    90: Chip("H100 SXM", 132, 2048, 227, 3350, 50),
    100: Chip("B200", 148, 2048, 227, 8000, 126),
    120: Chip("RTX 5090", 170, 1536, 99, 1792, 96),
}

TABLE = {
    75: Config(),
    80: Config(logits_warps=32),
    86: Config(),
    89: Config(),
    90: Config(logits_warps=32),
    100: Config(),
    120: Config(),
}

DEFAULT = 90  # other makers' GPUs, and Triton's interpreter


def architecture(device: torch.device) -> int:
    """The row of the table for a device: of an NVIDIA GPU that is not in it, the next older one's."""
    if device.type != "cuda" or torch.version.hip is not None:
        return DEFAULT
    major, minor = torch.cuda.get_device_capability(device)
    return max((known for known in TABLE if known <= 10 * major + minor), default=min(TABLE))


@functools.cache
def config(device: torch.device) -> Config:
    """The configuration of a device, cached."""
    return TABLE[architecture(device)]
