"""Decoding of weights of small floats in plain PyTorch.

A weight is ``value * scale``: 8-bit floats with a scale for the tensor, a row or a block (Micikevicius et al. 2022,
arXiv:2209.05433), or 4-bit ones with a scale for every 32 (MXFP4: a power of two, OCP Microscaling Formats 1.0) or
every 16 (NVFP4: an 8-bit float, with a second scale for the tensor) elements of a row. The product is formed in fp32
and rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
VALUES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SCALES = (torch.float32, torch.float16, torch.bfloat16)


class Layout(NamedTuple):
    """How a weight is stored; plain values only.

    Attributes:
        shape: (N, K) = (out_features, in_features).
        value: The format of an element: ``e4m3`` and ``e5m2`` take a byte, of ``e2m1`` two lie in one, the first in
            the low four bits.
        block: (rows, columns) that share a scale.
        scale: The format of the scales: ``float`` (fp32, fp16 or bf16), ``e4m3``, or ``e8m0`` (the exponent of two,
            plus 127).
        divide: Whether scales are divided by the tensor's second scale (compressed-tensors) and not multiplied with it
            (ModelOpt).
    """

    shape: tuple[int, int]
    value: str
    block: tuple[int, int]
    scale: str = "float"
    divide: bool = False


def decode(
    codes: torch.Tensor,
    scales: torch.Tensor,
    layout: Layout,
    out: torch.Tensor,
    *,
    outer: torch.Tensor | None = None,
    row_start: int = 0,
) -> None:
    """Decode rows ``row_start`` to ``row_start + len(out)`` of a weight [N, K] into ``out``.

    Args:
        codes: [N, K] 8-bit floats, or bytes of two 4-bit ones [N, K / 2].
        scales: [blocks of rows, blocks of columns], any strides; bytes or PyTorch's type for ``e4m3`` and ``e8m0``.
        layout: How the weight is stored.
        out: [rows, K] fp32, fp16 or bf16; the row stride may exceed K.
        outer: fp32, one element: the second scale (NVFP4), or None.
        row_start: First row to decode.

    Raises:
        ValueError: The tensors cannot hold these rows.
    """
    check(codes, scales, layout, out, outer, row_start)
    if not len(out):
        return
    (N, K), (high, wide) = layout.shape, layout.block
    data = codes.view(torch.uint8).view(N, -1)[row_start : row_start + len(out)]
    if layout.value == "e2m1":
        nibbles = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
        values = torch.tensor(E2M1, device=data.device).index_select(0, nibbles.flatten().int()).view(-1, K)
    else:
        values = data.view(VALUES[layout.value]).float()
    rows = torch.arange(row_start, row_start + len(out), device=data.device) // high
    scale = scales_of(scales, layout, outer).index_select(0, rows)
    if K % wide == 0:
        out.copy_(values.view(len(out), -1, wide).mul_(scale[..., None]).view(len(out), K))
    else:
        out.copy_(values.mul_(scale.repeat_interleave(wide, 1)[:, :K]))


def scales_of(scales: torch.Tensor, layout: Layout, outer: torch.Tensor | None) -> torch.Tensor:
    """The scales as fp32."""
    if layout.scale == "float":
        values = scales.float()
    elif layout.scale == "e4m3":
        values = scales.view(torch.float8_e4m3fn).float()
    else:
        exponent = scales.view(torch.uint8).int()
        bits = torch.where(exponent == 0, 1 << 22, exponent << 23)  # 2**-127 is subnormal
        values = torch.where(exponent == 255, torch.nan, bits.view(torch.float32))
    if outer is None:
        return values
    return values / outer.reshape(()) if layout.divide else values * outer.reshape(())


def check(
    codes: torch.Tensor,
    scales: torch.Tensor,
    layout: Layout,
    out: torch.Tensor,
    outer: torch.Tensor | None,
    row_start: int,
) -> None:
    """Raise ``ValueError`` where the tensors cannot hold the rows that are asked for. Looks at shapes only."""
    N, K = layout.shape
    if out.dim() != 2 or out.shape[1] != K or row_start < 0 or row_start + len(out) > N:
        raise ValueError(f"rows {row_start}.. into {tuple(out.shape)} do not lie in a weight of {N} x {K}")
    reason = mismatch(codes, scales, layout, outer)
    if reason is not None:
        raise ValueError(reason)


def mismatch(codes: torch.Tensor, scales: torch.Tensor, layout: Layout, outer: torch.Tensor | None) -> str | None:
    """Why these tensors are not a weight of this layout, or None. Looks at shapes and dtypes only."""
    (N, K), (high, wide) = layout.shape, layout.block
    if layout.value not in (*VALUES, "e2m1"):
        return f"there is no value format {layout.value!r}"
    if codes.element_size() != 1:
        return f"its values have dtype {codes.dtype}, not one byte each"
    if layout.value == "e2m1" and (wide % 8 or K % wide):
        return f"rows of {K} 4-bit values do not divide into groups of {wide}"
    need = N * K // 2 if layout.value == "e2m1" else N * K
    if codes.numel() != need:
        return f"{N} x {K} values take {need} bytes, there are {codes.numel()}"
    if high < 1 or wide < 1:
        return f"blocks of {high} x {wide} cannot share a scale"
    if layout.scale == "float" and scales.dtype not in SCALES:
        return f"its scales have dtype {scales.dtype}"
    if layout.scale != "float" and scales.element_size() != 1:
        return f"its {layout.scale} scales have dtype {scales.dtype}, not one byte each"
    blocks = (-(-N // high), -(-K // wide))
    if scales.shape != blocks:
        return f"scales of shape {tuple(scales.shape)} do not fit {N} x {K} in blocks of {high} x {wide}: {blocks}"
    if outer is not None and outer.numel() != 1:
        return f"the second scale has {outer.numel()} values, not one"
    return None
