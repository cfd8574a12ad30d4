"""The kernels in Gluon, as the compiler makes them for Hopper without a GPU.

    python -m tests.ops.test_hopper_compiled

prints a line of JSON for every kernel: what it takes of registers and memory, and which instructions it has.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fastplug.ops.configs import CHIPS, REGISTERS
from fastplug.ops.fp8.reference import FP8
from fastplug.ops.fp8.share import TILE
from fastplug.ops.gluon import FIRST
from tests.ops.test_launch_table import run

HOPPER = 90
GLUON = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2]) >= FIRST
RANKS = [(16, False), (32, False), (48, True), (128, False)]  # of adapters on one, two and three projections
UNITS = [(16, "silu"), (32, "silu"), (64, "gelu_tanh")]
SPILLED = 96  # bytes of registers that a thread of the unit's backward may put aside


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run("tests.ops.test_hopper_compiled", tmp_path_factory.mktemp("kernels"))


def test_products_fit_and_never_wait_for_the_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    """Four steps of the tensor cores and one wait: else the assembler has put one after each, at half the speed."""
    products = [kernel for kernel in compiled if "share" in kernel]
    assert len(products) == (len(RANKS) if GLUON else 0)
    for kernel in products:
        assert kernel["shared"] <= CHIPS[HOPPER].shared * 1024, kernel
        assert kernel["spilled"] == 0, kernel
        assert kernel["multiply"] == 4 + kernel["share"], kernel
        assert kernel["commit"] == 1 + kernel["blocks"], kernel


def test_two_programs_of_the_gated_unit_share_a_multiprocessor(compiled: list[dict[str, Any]]) -> None:
    """One computes while the other waits. Tiles move between memory and the tensor cores' layout 16 bytes at a time."""
    units = [kernel for kernel in compiled if "direction" in kernel]
    assert len(units) == (2 * len(UNITS) if GLUON else 0)
    for kernel in units:
        together = 1 if kernel["rank"] == 64 else 2
        assert together * (kernel["shared"] + 1024) <= 228 * 1024, kernel
        assert together * kernel["registers"] * kernel["warps"] * 32 <= REGISTERS, kernel
        assert kernel["spilled"] <= (SPILLED if kernel["direction"] == "backward" else 0), kernel
        assert kernel["multiply"] >= (2 if kernel["direction"] == "forward" else 5), kernel
        assert kernel["matrices"] > 0, kernel
        assert kernel["singles"] == 0, kernel


def test_what_they_sum_up_apart_is_added_up_in_registers(compiled: list[dict[str, Any]]) -> None:
    sums = [kernel for kernel in compiled if "added" in kernel]
    assert len(sums) == 4 * len(UNITS)
    assert all(kernel["spilled"] == 0 for kernel in sums), sums


def main() -> None:
    products()
    units()
    sums()


def sums(tokens: int = 256, width: int = 512) -> None:
    from fastplug.ops.adapted_glu import sums
    from fastplug.ops.adapted_glu.sizes import Stretches, blocks_per_column
    from tests.ops.ahead_of_time import compiling, resources

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    stretches = Stretches(4, 16, 7)
    for rank, _ in UNITS:
        sub = blocks_per_column(rank)
        parts = empty(width // 64 // sub, tokens, 2 * rank), empty(3, 3, width, rank, dtype=torch.float32)
        of_b, of_a = (empty(*shape, dtype=torch.float32) for shape in ((2, width, rank), (rank, width)))
        with compiling(HOPPER) as kernels:
            sums.of_rows(empty(3, tokens, rank, dtype=torch.float32), stretches, 0.5, empty(tokens, rank))
            for last, rstd in ((0, None), (rank, None), (rank, empty(tokens, dtype=torch.float32))):
                normed = None if rstd is None else empty(tokens, last + rank)
                out = sums.Columns(empty(tokens, last + rank), normed, rstd, of_b, of_a)
                columns = slice(0, rank), slice(last, last + rank)
                sums.of_columns(*parts, stretches, sub, columns, (0.5, 0.5), out, add=rstd is None)
        for name, kernel in kernels:
            print(json.dumps({"added": name, "rank": rank, **resources(kernel)}), flush=True)


def units(tokens: int = 256, width: int = 512) -> None:
    from tests.ops.ahead_of_time import compiling, resources

    if not GLUON:
        return
    from fastplug.ops.adapted_glu import hopper_backward, hopper_forward

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    for rank, activation in UNITS:
        gate_up, x, b, a = (
            empty(tokens, 2 * width),
            empty(tokens, 2 * rank),
            empty(2 * width, 2 * rank),
            empty(rank, width),
        )
        shared = ((x, x[:, rank:]), (b[:width], b[width:, rank:]), a, rank, 132, activation)
        for direction in ("forward", "backward"):
            with compiling(HOPPER) as kernels:
                if direction == "forward":
                    hopper_forward.launch(gate_up, empty(tokens, width), *shared)
                else:
                    hopper_backward.launch(empty(tokens, width), empty(tokens, rank), gate_up, gate_up, *shared)
            code = disassembled(kernels[0][1])
            counts = {
                "multiply": len(re.findall(r"\bHGMMA", code)),
                "matrices": len(re.findall(r"\b(?:LDSM|STSM)", code)),
                "singles": len(re.findall(r"\b(?:LDS|STS)\.U16", code)),
            }
            print(json.dumps({"direction": direction, "rank": rank, **resources(kernels[0][1]), **counts}), flush=True)


def products() -> None:
    from tests.ops.ahead_of_time import compiling, resources

    if not GLUON:
        return
    from fastplug.ops.fp8 import hopper

    for rank, transposed in RANKS:
        a, b = torch.empty(256, 4096, dtype=FP8), torch.empty(512, 4096, dtype=FP8)
        y, left = torch.empty(256, 512, dtype=torch.bfloat16), torch.empty(256, rank, dtype=torch.bfloat16)
        right = torch.empty((rank, 512) if transposed else (512, rank), dtype=torch.bfloat16)
        right = right.t() if transposed else right
        with compiling(HOPPER) as kernels:
            hopper.launch(y, a, torch.empty(256), b, torch.empty(512), left, right, 1.0, 132, TILE)
        block = 64 if rank > 32 or hopper.WHOLE else 32 if rank > 16 else 16
        blocks = -(-rank // block)
        for _, kernel in kernels:
            code = disassembled(kernel)
            counts = {
                "multiply": len(re.findall(r"\b[QH]GMMA", code)),
                "commit": len(re.findall(r"\b[QH]GMMA.*gsb0", code)),
                "blocks": blocks,
                "share": blocks * block // 16,
            }
            print(json.dumps({"rank": rank, **resources(kernel), **counts}), flush=True)


def disassembled(kernel: Any) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
