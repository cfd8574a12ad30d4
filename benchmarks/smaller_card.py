"""A GPU with the memory of a smaller one: a process of its own holds the rest."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

HOLD = """
import sys, torch
beyond = torch.cuda.mem_get_info()[0] - int(sys.argv[1])
if beyond < 0:
    sys.exit(f"only {(beyond + int(sys.argv[1])) / 2**30:.1f} GiB are free")
held = torch.empty(beyond, dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def smaller_card(gib: float | None) -> Iterator[None]:
    """Leave ``gib`` GiB free on the first GPU meanwhile, contexts of processes included; all of it for None.

    What PyTorch names as the device's memory stays, so a budget is to be given in GiB here, not as a fraction.

    Raises:
        RuntimeError: If less is free, or there is no GPU.
    """
    if gib is None:
        yield
        return
    command = [sys.executable, "-c", HOLD, str(int(gib * 2**30))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        if holder.stdout.readline().strip() != "held":
            raise RuntimeError(f"the GPU cannot be made a card of {gib} GiB: see the message above")
        try:
            yield
        finally:
            holder.stdin.close()


def held_by_others(gib: float | None) -> int:
    """The bytes of the first GPU that :func:`smaller_card` leaves to nobody."""
    if gib is None:
        return 0
    import torch

    return int(torch.cuda.mem_get_info()[1] - gib * 2**30)
