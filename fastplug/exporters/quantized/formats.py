"""The exporters of quantized merged models. They take the arguments of ``merged_16bit``, without ``dtype``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from fastplug.exporters.api import ExportResult
from fastplug.exporters.assembly import Merged, write_merged
from fastplug.exporters.quantized.bnb import encode_4bit, encode_8bit
from fastplug.exporters.quantized.compressed import FP8, INT8, W4A16, encode

Quant = Literal["nf4", "fp4", "int8"]
FORMS = {
    "merged_16bit": Merged("merged_16bit"),
    "merged_4bit": Merged("merged_4bit", encode=encode_4bit),
    "merged_8bit": Merged("merged_8bit", encode=encode_8bit),
    **{scheme.name: Merged(scheme.name, encode=partial(encode, scheme)) for scheme in (FP8, INT8, W4A16)},
}


def _write(
    name: str,
    model: Any,
    path: str | os.PathLike[str],
    *,
    adapter: str | Sequence[str] | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    quant: Quant | None = None,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    verify: bool = True,
) -> ExportResult:
    """See :func:`fastplug.exporters.merged.merged_16bit` for the arguments, the result and the errors."""
    return write_merged(
        model, path, FORMS[name], adapter=adapter, base=base, quant=quant, tokenizer=tokenizer, texts=texts,
        max_shard_size=max_shard_size, overwrite=overwrite, verify=verify,
    )  # fmt: skip


merged_4bit = partial(_write, "merged_4bit")
merged_8bit = partial(_write, "merged_8bit")
fp8 = partial(_write, "fp8")
int8 = partial(_write, "int8")
w4a16 = partial(_write, "w4a16")
