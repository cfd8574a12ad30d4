"""What the demo is asked for and what it found, as plain data."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from fastplug.errors import FastPlugError

LOSS_BOUND = {"float32": 1e-3, "bfloat16": 0.1}


class DemoError(FastPlugError, ValueError):
    """The demo cannot start: a setting or the data is not usable."""


@dataclass(frozen=True)
class DemoConfig:
    """Settings of :func:`fastplug.demo.run`.

    Attributes:
        model: A model folder or an id on the Hugging Face Hub; None is SmolLM2-135M-Instruct from a pip package.
        data: A JSON-lines file whose rows have ``messages``, or ``prompt`` and ``completion``, or ``text``; None is
            the English dialogs of the package chatterbot-corpus.
        out: The folder to write to.
        steps: Optimizer steps of each of the two runs.
        batch: Dialogs in a step.
        max_length: Longest dialog in tokens; longer ones are left out.
        seed: Of LoRA's A, and of the order of the data.
        device: ``"cuda"``, ``"cuda:1"``, ``"cpu"``; None is the GPU where there is one.
        question: What the model is asked before and after; None is a question that suits the data.
        rank: LoRA's rank; alpha is twice that, dropout is 0.
        learning_rate: Peak, after a warm-up over a tenth of the steps and before a linear decay.
        new_tokens: Longest answer in tokens.
        export: A format of ``fastplug.export`` to write at the end, e.g. ``"gguf:q4_k_m"``, whose file then answers.
    """

    model: str | None = None
    data: str | os.PathLike[str] | None = None
    out: str | os.PathLike[str] = "fastplug_demo"
    steps: int = 30
    batch: int = 8
    max_length: int = 80
    seed: int = 0
    device: str | None = None
    question: str | None = None
    rank: int = 16
    learning_rate: float = 1e-3
    new_tokens: int = 40
    export: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "max_length", "rank", "new_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise DemoError(f"fastplug demo: {name} must be a whole number of at least 1, not {value!r}")


@dataclass(frozen=True)
class RunResult:
    """One training run.

    Attributes:
        name: What the legend says.
        losses: One per optimizer step.
        tokens: Unpadded tokens of each step.
        seconds: Of each step, forward to optimizer, with the device waited for.
        batches: A checksum of each step's tokens, which shows that two runs read the same.
        warmup: Leading steps that the speed leaves out (compiling kernels, first touches of memory).
        peak_bytes: Highest use of memory (see ``memory_kind``); None where the system does not say.
        memory_kind: What ``peak_bytes`` counts, or why it is None.
        others: The part of all CPUs' time, 0 to 1, that other programs used meanwhile; None where it is not known.
    """

    name: str
    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    batches: tuple[int, ...]
    warmup: int
    peak_bytes: int | None
    memory_kind: str
    others: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """The median over the steps after the warm-up, which a busy machine moves less than the mean."""
        rates = sorted(n / s for n, s in list(zip(self.tokens, self.seconds))[self.warmup :])
        middle = len(rates) // 2
        return rates[middle] if len(rates) % 2 else (rates[middle - 1] + rates[middle]) / 2


@dataclass(frozen=True)
class Answer:
    """A question, and the model's answer to it before and after the fine-tuning."""

    question: str
    before: str
    after: str


@dataclass(frozen=True)
class LogitCheck:
    """The reloaded merged model against the model with its adapter, both computing in fp32, on some of the data.

    Attributes:
        error: ``|merged - adapter| / |adapter|`` over all logits of unpadded tokens, Euclidean norms.
        bound: What ``error`` must not exceed.
        trained: The same distance between the adapter switched off and on: how far training moved the logits.
        agreement: Share of tokens whose most likely successor is the same in both.
        tokens: How many tokens were compared.
    """

    error: float
    bound: float
    trained: float
    agreement: float
    tokens: int

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # False for a NaN


@dataclass(frozen=True)
class Exported:
    """What ``--export`` wrote: the format, the file or folder, the export's notes, and a GGUF's answer in libllama."""

    format: str
    path: Path
    notes: tuple[str, ...]
    answer: str | None


@dataclass(frozen=True)
class DemoResult:
    """All that the demo measured and wrote.

    Attributes:
        baseline, fastplug: The two runs.
        answer: The generated answers; the later one comes from the run with fastplug.
        logits: The check of the merged model.
        precision: ``"float32"`` or ``"bfloat16"``: what both runs computed in.
        device: For people, e.g. ``"cuda (NVIDIA H100)"``.
        dialogs: How many rows of the data were used, and how many were too long.
        seconds: Wall time of the whole demo.
        plot, adapter, merged, base: What was written; ``base`` is None where ``--model`` named it.
        report: fastplug's summary of what it patched.
        caution: Why the two speeds should not be compared, or None.
        exported: What ``--export`` wrote, or None.
    """

    baseline: RunResult
    fastplug: RunResult
    answer: Answer
    logits: LogitCheck
    precision: str
    device: str
    dialogs: tuple[int, int]
    seconds: float
    plot: Path
    adapter: Path
    merged: Path
    base: Path | None
    report: str
    caution: str | None = None
    exported: Exported | None = None

    @property
    def same_batches(self) -> bool:
        return self.baseline.batches == self.fastplug.batches

    @property
    def loss_difference(self) -> float:
        """The largest relative difference between the losses of the same step; infinite where a loss is NaN."""
        pairs = zip(self.baseline.losses, self.fastplug.losses)
        differences = [abs(ours - theirs) / max(abs(theirs), 1e-12) for theirs, ours in pairs]
        return math.inf if any(map(math.isnan, differences)) else max(differences)

    @property
    def loss_bound(self) -> float:
        """What ``loss_difference`` must not exceed: rounding grows from step to step, and more in bf16."""
        return LOSS_BOUND[self.precision]

    @property
    def ok(self) -> bool:
        """Whether the runs agree and the merged model gives the adapter's logits."""
        return self.same_batches and self.loss_difference <= self.loss_bound and self.logits.ok
