"""The types of a GGUF file: what each is called in libllama, what it needs, and how far it may be from the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastplug.errors import OptionError
from fastplug.exporters.proof import Bound


@dataclass(frozen=True)
class FileType:
    """One type.

    Attributes:
        name: As people write it, upper case.
        ftype: Its number in libllama (``llama_ftype`` in ``llama.h``).
        bound: How far a file of this type may be from the live model. Quantization costs a small model more than a
            large one; the bounds are for files that are wrong, at about three times what SmolLM2-135M costs.
        block: Rows must be a multiple of this many weights, or libllama gives the tensor another type.
        plain: Written while the weights are read, without libllama.
        needs_importance: libllama refuses it without an importance matrix.
    """

    name: str
    ftype: int
    bound: Bound
    block: int = 256
    plain: bool = False
    needs_importance: bool = False


_EXACT = Bound(kl=1e-3, top1=0.95, perplexity=1.02)
_BF16 = Bound(kl=0.05, top1=0.85, perplexity=1.15)  # libllama rounds what it multiplies with to bf16 too
_EIGHT = Bound(kl=1e-2, top1=0.85, perplexity=1.05)
_SIX = Bound(kl=0.05, top1=0.80, perplexity=1.10)
_FIVE = Bound(kl=0.3, top1=0.70, perplexity=1.25)
_FOUR = Bound(kl=1.0, top1=0.45, perplexity=2.0)
_THREE = Bound(kl=1.5, top1=0.35, perplexity=4.0)
_TWO = Bound(kl=4.0, top1=0.15, perplexity=40.0)

TYPES: dict[str, FileType] = {
    row.name: row
    for row in (
        FileType("F32", 0, Bound(kl=1e-4, top1=0.99, perplexity=1.01), 1, plain=True),
        FileType("F16", 1, _EXACT, 1, plain=True),
        FileType("BF16", 32, _BF16, 1, plain=True),
        FileType("Q8_0", 7, _EIGHT, 32, plain=True),
        FileType("Q6_K", 18, _SIX),
        FileType("Q5_K_M", 17, _FIVE),
        FileType("Q5_K_S", 16, _FIVE),
        FileType("Q5_0", 8, _FIVE, 32),
        FileType("Q4_K_M", 15, _FOUR),
        FileType("Q4_K_S", 14, _FOUR),
        FileType("Q4_0", 2, _FOUR, 32),
        FileType("IQ4_NL", 25, _FOUR, 32),
        FileType("IQ4_XS", 30, _FOUR),
        FileType("Q3_K_L", 13, _THREE),
        FileType("Q3_K_M", 12, _THREE),
        FileType("Q3_K_S", 11, _THREE),
        FileType("IQ3_M", 27, _THREE),
        FileType("IQ3_XXS", 23, _THREE, needs_importance=True),
        FileType("Q2_K", 10, _TWO),
        FileType("IQ2_M", 29, _TWO, needs_importance=True),
        FileType("IQ2_XS", 20, _TWO, needs_importance=True),
    )
}


def parse_types(types: str | Iterable[str]) -> tuple[FileType, ...]:
    """``"q8_0,q4_k_m"`` or a list of names, as rows of :data:`TYPES`; each once, in the given order.

    Raises:
        OptionError: An unknown name, or none.
    """
    names = types.split(",") if isinstance(types, str) else list(types)
    found: dict[str, FileType] = {}
    for name in names:
        key = str(name).strip().upper().replace("-", "_")
        if key not in TYPES:
            raise OptionError(f"fastplug: there is no GGUF type {name!r} here; one or more of {', '.join(TYPES)}")
        found[key] = TYPES[key]
    if not found:
        raise OptionError('fastplug: types= names no GGUF type; for example types="q4_k_m" or types=["q8_0", "q4_k_m"]')
    return tuple(found.values())
