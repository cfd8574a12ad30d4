"""Weight formats: one codec per format."""

from __future__ import annotations

from fastplug.manager import hookimpl
from fastplug.quant.codec import Codec, EncodedWeight


@hookimpl
def fastplug_codecs() -> list[Codec]:
    from fastplug.quant.bnb4 import BitsAndBytes4
    from fastplug.quant.plain import Plain

    return [Plain(), BitsAndBytes4()]


__all__ = ["Codec", "EncodedWeight"]
