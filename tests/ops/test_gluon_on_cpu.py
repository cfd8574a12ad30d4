"""The stand-in for a GPU that runs Gluon kernels on the CPU: right kernels pass in it, and mistakes are seen."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastplug.ops import gluon
from tests.accuracy import assert_as_accurate
from tests.ops.gluon_on_cpu import emulated
from tests.ops.test_adapted_glu import Case, in_one_pass
from tests.ops.test_fp8_share import SHAPES, operands

pytestmark = pytest.mark.skipif(not gluon.recent(), reason="this Triton has not what the kernels are written in")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("M", "N", "K", "R", "alpha"), SHAPES[1:])
def test_fp8_products_with_a_share(M, N, K, R, alpha, turned, late):
    rows, left, right = operands(M, N, K, R, torch.device("cpu"), turned)
    kernels = emulated(importlib.import_module("fastplug.ops.fp8.hopper"), late)
    y = torch.full((M, N), 7.0, dtype=torch.bfloat16)
    kernels["launch"](y, *rows, left, right, alpha, 3, (128, 256))
    a, b = (values.double() * scale.double()[:, None] for values, scale in (rows[:2], rows[2:]))
    truth = a @ b.t() + alpha * (left.double() @ right.double().t())
    assert_as_accurate([y], [truth.to(torch.bfloat16)], [truth])


def changed(folder: Path, old: str, new: str) -> ModuleType:
    """The backward of the gated unit with another text in one place."""
    source = Path(importlib.import_module("fastplug.ops.adapted_glu.hopper_backward").__file__ or "").read_text(
        encoding="utf-8"
    )
    assert source.count(old) >= 1, old
    name = f"changed_{abs(hash((old, new)))}"
    file = folder / f"{name}.py"
    file.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


MISTAKES = {
    "a tile is read before it is there": ("    mbarrier.wait(ready, phase)\n", ""),
    "a buffer is filled while its tile is being stored": ("tma.store_wait(2)", "tma.store_wait(4)"),
    "a buffer is filled while its tile is being multiplied": (
        "    return warpgroup_mma_wait(0, (gb_gate, gb_up, db_gate, db_up, da))",
        "    return gb_gate, gb_up, db_gate, db_up, da",
    ),
    "a tile is fetched into the wrong buffer": ("    stage = j % STAGES\n    mbarrier", "    stage = 0\n    mbarrier"),
    "another number of bytes is waited for": ("3 * 64 * 64 * 2, pred", "64, pred"),
    "the phase never changes": ("ready.index(stage), j // STAGES & 1, ACTIVATION", "ready.index(stage), 0, ACTIVATION"),
    "a program ends before its stores": ("        unit = stop\n    tma.store_wait(0)", "        unit = stop"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.ops.gluon_on_cpu.TIMEOUT", 0.2)
    module, case = changed(tmp_path, *MISTAKES[mistake]), Case(300, 320)

    def run(late: bool) -> None:
        case.check(in_one_pass(case, late, backward=module))

    seen = []
    for late in (False, True):
        try:
            run(late)
        except (AssertionError, AttributeError) as error:
            seen.append(error)
    assert seen, "nothing failed"
