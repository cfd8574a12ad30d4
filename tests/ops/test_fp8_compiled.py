"""FP8 products with an adapter's share, and activations in FP8, as the compiler makes them for Hopper without a GPU.

    python -m tests.ops.test_fp8_compiled

prints a line of JSON for every kernel: what it takes of registers and memory, and which instructions it has.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fastplug.ops.configs import CHIPS, REGISTERS, WARP
from fastplug.ops.fp8 import gemm
from fastplug.ops.fp8.reference import FP8
from fastplug.ops.glu import quantizing
from tests.ops.test_launch_table import run

HOPPER = 90
RANKS = [(16, False), (32, False), (48, True), (128, False)]  # of adapters on one, two and three projections


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run("tests.ops.test_fp8_compiled", tmp_path_factory.mktemp("kernels"))


def test_products_fit_and_never_wait_for_the_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    """Four steps of the tensor cores and one wait: else the assembler has put one after each, at half the speed."""
    products = [kernel for kernel in compiled if kernel["kind"] in ("plain", "specialized")]
    assert {kernel["kind"] for kernel in products} == {"plain"} | ({"specialized"} if gemm.specialized else set())
    for kernel in products:
        assert kernel["shared"] <= CHIPS[HOPPER].shared * 1024, kernel
        assert kernel["spilled"] <= (64 if kernel["kind"] == "plain" else 0), kernel  # after the loop
        assert kernel["multiply"] == 4, kernel
        assert kernel["commit"] == 1, kernel
        assert kernel["share"] >= 1, kernel


def test_activations_leave_room_for_several_rows_at_once(compiled: list[dict[str, Any]]) -> None:
    kernels = [kernel for kernel in compiled if kernel["kind"] == "activation"]
    assert len(kernels) == 2
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert 2 * kernel["registers"] * kernel["warps"] * WARP <= REGISTERS, kernel


def main() -> None:
    from tests.ops.ahead_of_time import compiling, resources

    for rank, transposed in RANKS:
        a, b = torch.empty(256, 4096, dtype=FP8), torch.empty(512, 4096, dtype=FP8)
        y, left = torch.empty(256, 512, dtype=torch.bfloat16), torch.empty(256, rank, dtype=torch.bfloat16)
        right = torch.empty((rank, 512) if transposed else (512, rank), dtype=torch.bfloat16)
        operands = y, a, torch.empty(256), b, torch.empty(512), left, right.t() if transposed else right, 1.0
        with compiling(HOPPER) as kernels:
            gemm.launch(*operands, gemm.CONFIG)
            if gemm.specialized:
                gemm.specialized.launch(*operands, 132)
        for kind, (_, kernel) in zip(("plain", "specialized"), kernels):
            code = disassembled(kernel)
            counts = {
                "multiply": len(re.findall(r"\bQGMMA", code)),
                "commit": len(re.findall(r"\bQGMMA.*gsb0", code)),
                "share": len(re.findall(r"\bHGMMA", code)),
            }
            print(json.dumps({"kind": kind, "rank": rank, **resources(kernel), **counts}), flush=True)
    both, down = torch.empty(64, 28672, dtype=torch.bfloat16), torch.empty(64, 14336, dtype=torch.bfloat16)
    gate, up = both.split(14336, dim=1)
    with compiling(HOPPER) as kernels:
        quantizing.forward_quantized(gate, up, "silu", down)
        quantizing.backward_quantized(down, gate, up, "silu", both, down)
    for _, kernel in kernels:
        print(json.dumps({"kind": "activation", **resources(kernel)}), flush=True)


def disassembled(kernel: Any) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
