"""The measures of a proof: largest logit difference, KL divergence, top-1 agreement, perplexity."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from fastplug.exporters.api import ExportError
from fastplug.exporters.proof.bounds import Bound
from fastplug.exporters.proof.runtime import Runtime
from fastplug.exporters.proof.sample import Sample

_ROWS = 32  # positions at a time in fp64: 64 MiB at a vocabulary of 256k
_CLEAR = 0.05  # a lead of the first token over the second, in nats, that rounding must not turn around


class ProofError(ExportError):
    """The written file does not behave like the live model. Nothing was left under the final name."""

    def __init__(self, message: str, proof: Proof) -> None:
        super().__init__(message)
        self.proof = proof


@dataclass(frozen=True)
class Proof:
    """How near two runtimes are on a sample.

    Attributes:
        reference: Name of the first runtime, the live model.
        candidate: Name of the second, the file.
        positions: Positions compared.
        logits: Largest absolute difference of two logits.
        kl: Mean of ``KL(reference || candidate)`` over all positions, in nats.
        kl_max: Its largest value.
        top1: Share of positions at which both put the same token first.
        top1_clear: The same among the positions at which the reference's first token leads by 0.05 nats.
        perplexity_reference: ``exp`` of the mean cross entropy on the held-out text.
        perplexity_candidate: The same of the file.
        bound: What was allowed; None: nothing was.
        sample: What was compared on, for people.
    """

    reference: str
    candidate: str
    positions: int
    logits: float
    kl: float
    kl_max: float
    top1: float
    top1_clear: float
    perplexity_reference: float
    perplexity_candidate: float
    bound: Bound | None = None
    sample: str = ""

    def failures(self) -> list[str]:
        """What lies outside of the bound, one phrase each; empty when all is well."""
        numbers = (self.logits, self.kl, self.perplexity_reference, self.perplexity_candidate)
        if not all(map(math.isfinite, numbers)):
            return ["logits that are not finite"]
        if self.bound is None:
            return []
        found = []
        if self.kl > self.bound.kl:
            found.append(f"KL {self.kl:.3g} (allowed {self.bound.kl:g})")
        if self.top1_clear < self.bound.top1:
            found.append(f"top-1 agreement {self.top1_clear:.1%} (allowed {self.bound.top1:.1%})")
        if self.perplexity_candidate > self.perplexity_reference * self.bound.perplexity:
            ratio = self.perplexity_candidate / self.perplexity_reference
            found.append(f"perplexity {ratio:.3f} times the live model's (allowed {self.bound.perplexity:g})")
        return found

    def __str__(self) -> str:
        allowed = f" (allowed {self.bound.kl:g})" if self.bound is not None else ""
        return (
            f"{self.candidate} against {self.reference}, {self.positions} positions: largest logit difference "
            f"{self.logits:.3g}, KL {self.kl:.2e}{allowed}, top-1 agreement {self.top1:.1%}, "
            f"perplexity {self.perplexity_candidate:.4g} (live {self.perplexity_reference:.4g})"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for ``fastplug.json`` and the model card."""
        return asdict(self)


@dataclass
class _Sums:
    positions: int = 0
    kl: float = 0.0
    kl_max: float = 0.0
    logits: float = 0.0
    same: int = 0
    clear: int = 0
    clear_same: int = 0
    targets: int = 0
    nll: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def add(self, one: Tensor, two: Tensor, targets: Tensor | None) -> None:
        """``one``, ``two``: fp32 [rows, vocabulary]; ``targets``: int64 [rows] or None."""
        self.logits = max(self.logits, float((one - two).abs().max()))
        log_p, log_q = one.double().log_softmax(-1), two.double().log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        self.positions += len(one)
        self.kl += float(kl.sum())
        self.kl_max = max(self.kl_max, float(kl.max()))
        lead = log_p.topk(2).values
        same, clear = log_p.argmax(-1) == log_q.argmax(-1), lead[:, 0] - lead[:, 1] > _CLEAR
        self.same += int(same.sum())
        self.clear += int(clear.sum())
        self.clear_same += int((same & clear).sum())
        if targets is not None:
            self.targets += len(targets)
            for index, log in enumerate((log_p, log_q)):
                self.nll[index] -= float(log.gather(-1, targets[:, None]).sum())


def compare(reference: Runtime, candidate: Runtime, sample: Sample, bound: Bound | None = None) -> Proof:
    """Run both on every sequence of ``sample``, one at a time, and measure.

    Vocabularies may differ in padding: the columns that both have are compared.

    Raises:
        ExportError: A runtime that answers with another number of positions.
    """
    sums = _Sums()
    for ids, heldout in ((ids, kind) for kind, part in ((False, sample.prompts), (True, sample.texts)) for ids in part):
        one, two = reference.logits(ids), candidate.logits(ids)
        if one.shape[0] != len(ids) or two.shape[0] != len(ids):
            raise ExportError(
                f"fastplug: {len(ids)} tokens gave logits at {one.shape[0]} ({reference.name}) and {two.shape[0]} "
                f"({candidate.name}) positions"
            )
        width = min(one.shape[1], two.shape[1])
        for begin in range(0, len(ids), _ROWS):
            rows = slice(begin, begin + _ROWS)
            a, b = one[rows, :width].float(), two[rows, :width].float()
            targets = ids[begin + 1 : begin + _ROWS + 1]
            if heldout and len(targets) == len(a):
                sums.add(a, b, targets)
            elif heldout and len(targets):  # the last position has no target
                sums.add(a[: len(targets)], b[: len(targets)], targets)
                sums.add(a[len(targets) :], b[len(targets) :], None)
            else:
                sums.add(a, b, None)
    perplexities = [math.exp(min(nll / sums.targets, 700.0)) if sums.targets else math.nan for nll in sums.nll]
    return Proof(
        reference.name,
        candidate.name,
        sums.positions,
        sums.logits,
        max(sums.kl / max(sums.positions, 1), 0.0),
        sums.kl_max,
        sums.same / max(sums.positions, 1),
        sums.clear_same / sums.clear if sums.clear else 1.0,
        perplexities[0],
        perplexities[1],
        bound,
        sample.description,
    )


def prove(reference: Runtime, candidate: Runtime, sample: Sample, bound: Bound) -> Proof:
    """:func:`compare`, and raise if the result lies outside of ``bound``.

    Raises:
        ProofError: It does. The proof is in its attribute ``proof``.
    """
    proof = compare(reference, candidate, sample, bound)
    if failures := proof.failures():
        raise ProofError(
            f"fastplug: the written file is not the live model: {', '.join(failures)}. {proof}. Nothing was kept; "
            "verify=False (--no-verify) keeps such a file if that is what you want",
            proof,
        )
    return proof


__all__ = ["Proof", "ProofError", "compare", "prove"]
