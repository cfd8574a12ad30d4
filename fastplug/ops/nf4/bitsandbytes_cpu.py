"""Decoding of blockwise 4-bit weights on a CPU by bitsandbytes' own vectorised code, faster than the reference.

It is taken only for what it computes rightly and directly: whole rows of whole blocks of the standard codes, into fp32,
bf16 or fp16. (For rows that are no multiple of the block it reads wrong scales, bitsandbytes 0.50.) Everything else is
the reference's.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

from fastplug.ops.nf4 import reference
from fastplug.ops.nf4.reference import Nested

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_BLOCK = 1024  # from 2048 on, bitsandbytes itself distrusts its vectorised code


@functools.cache
def reason() -> str | None:
    """Why bitsandbytes cannot decode here, or None if it can."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    try:
        import bitsandbytes  # noqa: F401

        _op()
    except Exception as error:  # a broken install must not break the reference path
        return f"bitsandbytes cannot decode on a CPU: {error}"
    return None


@functools.cache
def _op() -> Any:
    return torch.ops.bitsandbytes.dequantize_4bit.default


@functools.cache
def _kinds() -> list[tuple[str, torch.Tensor]]:
    """The standard codes by the names that bitsandbytes has for them."""
    from bitsandbytes.functional import get_4bit_type

    return [(kind, get_4bit_type(kind, device="cpu")) for kind in ("nf4", "fp4")]


def decode(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    out: torch.Tensor,
    *,
    nested: Nested | None = None,
    row_start: int = 0,
) -> None:
    """As :func:`fastplug.ops.nf4.reference.decode`."""
    rows, columns = out.shape
    if torch.compiler.is_compiling():  # which code it is can be seen in its values only, and those a trace has not
        reference.decode(packed, absmax, code, blocksize, out, nested=nested, row_start=row_start)
        return
    kind = next((kind for kind, known in _kinds() if torch.equal(known, code)), None)
    if kind is None or columns % blocksize or blocksize > LARGEST_BLOCK or out.dtype not in DTYPES or not rows:
        reference.decode(packed, absmax, code, blocksize, out, nested=nested, row_start=row_start)
        return
    reference.check(packed, absmax, blocksize, row_start, out, nested)
    start, count = row_start * columns, rows * columns
    part = packed.reshape(-1)[start // 2 : (start + count) // 2]
    scale = _scales(absmax, nested)[start // blocksize : (start + count) // blocksize]
    decoded = _op()(part, scale.contiguous(), blocksize, kind, (rows, columns), out.dtype)
    if out.untyped_storage().nbytes() == decoded.nbytes and not out._is_view():
        out.set_(decoded)  # nobody else holds its memory: copying takes nearly as long as decoding
    else:
        out.copy_(decoded)


def _scales(absmax: torch.Tensor, nested: Nested | None) -> torch.Tensor:
    """As :func:`fastplug.ops.nf4.reference.scales`, to the same bits, without repeating the nested scales."""
    if nested is None:
        return absmax
    code, absmax2, offset, blocksize = nested
    values = code.index_select(0, absmax.reshape(-1).int())
    blocks = values.numel() // blocksize
    values[: blocks * blocksize].view(blocks, blocksize).mul_(absmax2[:blocks, None])
    if blocks * blocksize < values.numel():
        values[blocks * blocksize :].mul_(absmax2[blocks])
    return values.add_(offset)
