"""Weight formats: one codec per format."""

from __future__ import annotations

from fastplug.manager import hookimpl
from fastplug.quant.codec import Codec, EncodedWeight


@hookimpl
def fastplug_codecs() -> list[Codec]:
    from fastplug.quant.bnb4 import BitsAndBytes4
    from fastplug.quant.plain import Plain
    from fastplug.quant.quant_linear import QuantLinearWeights

    return [Plain(), BitsAndBytes4(), QuantLinearWeights()]


__all__ = ["Codec", "EncodedWeight"]
