"""How far a file may be from the live model: one bound per format."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """What a format may cost.

    Attributes:
        kl: Largest mean Kullback-Leibler divergence from the live model's next-token distribution, in nats.
        top1: Smallest share of positions at which both put the same token first, among those where the live model is
            not torn between two tokens anyway (see :class:`~fastplug.exporters.proof.compare.Proof`).
        perplexity: Largest ratio of the file's perplexity on the held-out text to the live model's.
    """

    kl: float
    top1: float
    perplexity: float

    def widened(self, other: Bound) -> Bound:
        """The wider of the two in each measure."""
        return Bound(max(self.kl, other.kl), min(self.top1, other.top1), max(self.perplexity, other.perplexity))


# Measured on SmolLM2-135M-Instruct, a LoRA of rank 16 on chat dialogs, 877 positions of held-out ones, KL: merged_32bit
# 6e-12, merged_16bit 4e-5 (bf16 onto bf16), 1.1e-4 (bf16 onto decoded NF4), 5e-7 (fp16), merged_8bit 9e-3, merged_4bit
# 0.12, w4a16 0.33 (groups of 64), NF4 merged onto its original base 0.18. Larger models lose less.
BOUNDS: dict[str, Bound] = {
    "lora": Bound(kl=1e-4, top1=0.99, perplexity=1.01),
    "merged_32bit": Bound(kl=1e-4, top1=0.99, perplexity=1.01),
    "merged_16bit": Bound(kl=5e-4, top1=0.97, perplexity=1.02),
    "onnx": Bound(kl=1e-4, top1=0.99, perplexity=1.01),
    "fp8": Bound(kl=0.05, top1=0.85, perplexity=1.10),
    "merged_8bit": Bound(kl=0.05, top1=0.85, perplexity=1.10),
    "int8": Bound(kl=0.05, top1=0.85, perplexity=1.10),
    "merged_4bit": Bound(kl=0.30, top1=0.70, perplexity=1.35),
    "w4a16": Bound(kl=0.50, top1=0.65, perplexity=1.70),
    "onto the original base": Bound(kl=0.30, top1=0.70, perplexity=1.35),
    "repacked 4-bit scales": Bound(kl=0.01, top1=0.95, perplexity=1.02),
    "8-bit activations": Bound(kl=0.02, top1=0.90, perplexity=1.05),
}
