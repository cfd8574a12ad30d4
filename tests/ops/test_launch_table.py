"""The table of launch configurations, against what the compiler makes of every kernel on every chip of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastplug.ops import configs
from fastplug.ops.configs import CHIPS, REGISTERS, TABLE, WARP

ROOT = Path(__file__).parents[2]
# A chip takes 10 s: the smallest, the measured and the newest every day, all of them with FASTPLUG_ALL_CHIPS=1.
COMPILED = tuple(CHIPS) if os.environ.get("FASTPLUG_ALL_CHIPS") else (75, 90, 120)
FRAME = 8  # bytes of stack that Triton 3.6's compiler gives a kernel which calls 64-bit division
# The first architecture that has the instructions.
NEEDS = {"fp8": 89, "low_rank": 80, "adapter_gradients": 80, "adapted_rope": 80}
ENOUGH = 0.85  # of the memory's bandwidth
# How many tensors a program reads before it computes, each with ``accesses`` accesses of a thread; a head of rope
# counts as two, its two halves.
READ = {
    "rms_norm._forward_kernel": 1, "rms_norm._backward_kernel": 2, "rope._forward_kernel": 2,
    "rope._backward_kernel": 2, "glu._forward_kernel": 2, "glu._backward_kernel": 3, "logprobs._logprobs_kernel": 1,
    "logprobs._backward_kernel": 1, "scaling._scale_kernel": 1,
}  # fmt: skip


def compiler() -> Path | None:
    triton = pytest.importorskip("triton")
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    return tools if (tools / "ptxas").exists() and (tools / "cuobjdump").exists() else None


def run(module: str, cache: Path, *words: object) -> list[Any]:
    """The lines of JSON that a module prints, in a process without Triton's interpreter and with an empty cache."""
    if compiler() is None:
        pytest.skip("this Triton comes without NVIDIA's assembler")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line[:1] in "[{"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run("tests.ops.ahead_of_time", tmp_path_factory.mktemp("kernels"), *COMPILED)


def name(kernel: dict[str, Any]) -> str:
    _, _, op, _, function = kernel["kernel"].split(".")
    return f"{op}.{function}"


def kernels() -> set[str]:
    """All of them, as their files name them: what is launched."""
    found = set()
    for file in (ROOT / "fastplug/ops").glob("*/kernel.py"):
        launched = re.findall(r"\blaunched\((\w+),", file.read_text(encoding="utf-8"))
        found |= {f"{file.parent.name}.{function}" for function in launched}
    return found


def test_the_table_names_the_architectures_that_are_promised() -> None:
    assert set(TABLE) == set(CHIPS) == {75, 80, 86, 89, 90, 100, 120}


@pytest.mark.parametrize(
    ("capability", "row"),
    [((7, 0), 75), ((7, 5), 75), ((8, 0), 80), ((8, 7), 86), ((8, 9), 89), ((9, 0), 90), ((10, 3), 100),
     ((12, 0), 120), ((12, 1), 120), ((13, 0), 120)],
)  # fmt: skip
def test_an_unknown_gpu_takes_the_row_of_the_next_older_one(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], row: int
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert configs.architecture(torch.device("cuda", 0)) == row


def test_other_devices_take_the_measured_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configs.config(torch.device("cpu")) == TABLE[90]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert configs.architecture(torch.device("cuda", 0)) == 90


@pytest.mark.parametrize("capability", COMPILED)
def test_every_kernel_fits_into_the_chip(compiled: list[dict[str, Any]], capability: int) -> None:
    chip, mine = CHIPS[capability], [kernel for kernel in compiled if kernel["capability"] == capability]
    expected = {kernel for kernel in kernels() if capability >= NEEDS.get(kernel.split(".")[0], 0)}
    assert {name(kernel) for kernel in mine} == expected
    for kernel in mine:
        threads = kernel["warps"] * WARP
        assert kernel["shared"] <= chip.shared * 1024, kernel
        assert kernel["spilled"] <= FRAME, kernel
        assert threads <= 1024, kernel
        assert kernel["registers"] * threads <= REGISTERS, kernel


@pytest.mark.parametrize("capability", COMPILED)
def test_enough_bytes_are_in_flight(compiled: list[dict[str, Any]], capability: int) -> None:
    """The arithmetic of the table's docstring, with the registers that the compiler took."""
    chip = CHIPS[capability]
    for kernel in compiled:
        read, threads = READ.get(name(kernel), 0), kernel["warps"] * WARP
        registers = -(-kernel["registers"] // 8) * 8  # given out eight at a time
        softcap = name(kernel).startswith("logprobs") and registers > 96  # its tanh, and not the memory, is the limit
        if kernel["capability"] != capability or not read or softcap:
            continue
        shared = (chip.shared + 1) * 1024 // (kernel["shared"] + 1024)
        resident = threads * min(chip.threads // threads, REGISTERS // (registers * threads), shared)
        found = read * resident * TABLE[capability].accesses * configs.ACCESS
        assert found >= ENOUGH * chip.in_flight(), (resident, kernel)


def test_other_lengths_compile_nothing(tmp_path: Path) -> None:
    """One even, one odd, one shorter than a tile, one of a single token, and one longer than all before."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    lines = run("tests.engine.kernels_of_a_step", tmp_path, "lora,qlora", 64, 61, 33, 1, 128)
    for kind in ("lora", "qlora"):
        first, *others = [line["new"] for line in lines if line["kind"] == kind]
        assert 5 <= len(first) <= 16, first  # a dozen kernels is what a first step waits for
        assert others == [[]] * 4
