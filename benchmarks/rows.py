"""What is measured: one setting of the training step that all systems run."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

FLAGS = ("dora", "checkpointed", "prepared", "autocast", "random", "prompts")
SHORTEST = 128  # tokens of the shortest batch where lengths are random

# The rows that fastplug is held to, the ones without gradient checkpointing first.
TABLE = (
    "qlora:4x2048",
    "qlora:2x512",
    "lora:4x2048",
    "lora:2x512",
    "qlora:4x2048:checkpointed",
    "qlora:2x512:checkpointed",
)


@dataclass(frozen=True)
class Row:
    """One setting that all systems run.

    ``dora`` gives the adapters a magnitude (``LoraConfig(use_dora=True)``); ``prepared`` applies PEFT's
    ``prepare_model_for_kbit_training``, which makes the residual stream fp32; ``random`` draws the length of each batch
    between 128 and ``sequence`` and measures from the first step on; ``prompts`` takes the labels of the first half of
    each sequence away, as trainers do with what the user said.
    """

    quantization: str
    batch: int
    sequence: int
    dora: bool = False
    checkpointed: bool = False
    prepared: bool = False
    autocast: bool = False
    random: bool = False
    prompts: bool = False

    @classmethod
    def parse(cls, text: str) -> Row:
        """``qlora`` or ``lora``, then ``BATCHxSEQUENCE``, then any of the flags, joined by colons.

        Raises:
            argparse.ArgumentTypeError: For anything else.
        """
        kind, _, rest = text.partition(":")
        size, *flags = rest.split(":")
        batch, _, sequence = size.partition("x")
        if kind not in ("qlora", "lora") or set(flags) - set(FLAGS) or not (batch.isdigit() and sequence.isdigit()):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no row: write qlora or lora, then :BATCHxSEQUENCE, then any of :{' :'.join(FLAGS)}"
            )
        return cls(kind, int(batch), int(sequence), *(flag in flags for flag in FLAGS))

    @property
    def loading(self) -> tuple[str, bool, bool, bool]:
        """What a model has to be loaded anew for."""
        return self.quantization, self.dora, self.checkpointed, self.prepared

    @property
    def without_dora(self) -> Row:
        """The row whose adapters are plain LoRA."""
        return replace(self, dora=False)

    @property
    def otherwise_checkpointed(self) -> Row:
        """The row that computes the same with gradient checkpointing, or without where this one has it."""
        return replace(self, checkpointed=not self.checkpointed)

    def __str__(self) -> str:
        flags = [flag for flag in FLAGS if getattr(self, flag)]
        return ":".join([self.quantization, f"{self.batch}x{self.sequence}", *flags])


def lengths(row: Row, steps: int, seed: int = 0) -> list[int]:
    """The tokens a sequence of each step: all alike, or drawn evenly from 128 to ``row.sequence``, always the same."""
    import random

    if not row.random:
        return [row.sequence] * steps
    draw = random.Random(seed)
    return [draw.randint(min(SHORTEST, row.sequence), row.sequence) for _ in range(steps)]
