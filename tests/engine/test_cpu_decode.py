"""4-bit weights on a CPU are decoded by bitsandbytes' own code where that is right, to the reference's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastplug
from fastplug.ops.nf4 import bitsandbytes_cpu, reference
from fastplug.ops.table import table_for
from tests import models

pytest.importorskip("bitsandbytes")


def packed(rows: int, columns: int, kind: str, double: bool, blocksize: int) -> tuple[Any, ...]:
    from bitsandbytes import functional

    weight = torch.randn(rows, columns)
    data, state = functional.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double, quant_type=kind)
    nested = None
    if state.nested:
        nested = (state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    return data, state.absmax, state.code, blocksize, nested


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_bits_are_those_of_the_reference(kind: str, double: bool, dtype: torch.dtype) -> None:
    """Also for rows in the middle, strided outputs, and widths that bitsandbytes itself gets wrong."""
    for rows, columns, blocksize in ((96, 192, 64), (32, 576, 64), (7, 256, 128), (9, 96, 64), (5, 33, 64)):
        data, absmax, code, blocksize, nested = packed(rows, columns, kind, double, blocksize)
        for start, count in ((0, rows), (2, rows - 3), (rows, 0)):
            ours = torch.full((count, columns + 8), 7.0, dtype=dtype)
            theirs = torch.empty(count, columns, dtype=dtype)
            bitsandbytes_cpu.decode(data, absmax, code, blocksize, ours[:, :columns], nested=nested, row_start=start)
            reference.decode(data, absmax, code, blocksize, theirs, nested=nested, row_start=start)
            assert torch.equal(ours[:, :columns], theirs), (rows, columns, start)
            assert (ours[:, columns:] == 7).all()


def test_a_code_of_its_own_is_left_to_the_reference() -> None:
    data, absmax, code, blocksize, nested = packed(4, 128, "nf4", False, 64)
    ours, theirs = torch.empty(4, 128), torch.empty(4, 128)
    for part, decode in ((ours, bitsandbytes_cpu.decode), (theirs, reference.decode)):
        decode(data, absmax, code * 1.25, blocksize, part, nested=nested)
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="absmax has dtype"):
        bitsandbytes_cpu.decode(data, absmax.byte(), code, blocksize, ours)


@pytest.mark.skipif(bitsandbytes_cpu.reason() is not None, reason=str(bitsandbytes_cpu.reason()))
def test_it_is_chosen_on_a_cpu_alone_and_on_no_other_wish() -> None:
    cpu = torch.device("cpu")
    assert table_for(cpu).names["nf4"] == "bitsandbytes"
    assert table_for(cpu, "reference").names["nf4"] == "reference"
    assert table_for(torch.device("cuda", 0)).names["nf4"] != "bitsandbytes"
    if not torch.cuda.is_available():
        assert fastplug.apply(models.qlora()).report.ops["nf4"] == "bitsandbytes"
