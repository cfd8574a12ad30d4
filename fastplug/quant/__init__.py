"""Weight formats: one codec per format."""

from __future__ import annotations

from fastplug.manager import hookimpl
from fastplug.quant.codec import Codec, Damaged, EncodedWeight


@hookimpl
def fastplug_codecs() -> list[Codec]:
    from fastplug.quant.awq import AWQ
    from fastplug.quant.bnb4 import BitsAndBytes4
    from fastplug.quant.bnb8 import BitsAndBytes8
    from fastplug.quant.compressed import CompressedTensors
    from fastplug.quant.fp8 import FP8
    from fastplug.quant.gptq import GPTQ
    from fastplug.quant.hqq import HQQ
    from fastplug.quant.plain import Plain
    from fastplug.quant.quant_linear import QuantLinearWeights
    from fastplug.quant.torchao import TorchAO

    return [
        Plain(), BitsAndBytes4(), BitsAndBytes8(), FP8(), CompressedTensors(), GPTQ(), AWQ(), HQQ(), TorchAO(),
        QuantLinearWeights(),
    ]  # fmt: skip


__all__ = ["Codec", "Damaged", "EncodedWeight"]
