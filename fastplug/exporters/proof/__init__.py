"""The proof of an export: the written file, in the runtime it is meant for, against the live model.

    reference = LiveRuntime(model)                  # the adapter model as it stands
    candidate = ...                                 # any Runtime: the file, loaded afresh
    sample = sample_for(tokenizer, vocabulary)      # prompts and held-out text, as token ids
    proof = prove(reference, candidate, sample, BOUNDS["merged_16bit"])    # raises ProofError outside of the bound

A :class:`Runtime` is a name and ``logits(token_ids)``; everything else here (which tokens, the measures, the bounds,
the words for people) is the same for transformers, libllama, onnxruntime and whatever a plugin brings.
"""

from __future__ import annotations

from fastplug.exporters.proof.bounds import BOUNDS, Bound
from fastplug.exporters.proof.compare import Proof, ProofError, compare, prove
from fastplug.exporters.proof.runtime import LiveRuntime, Recorded, Runtime
from fastplug.exporters.proof.sample import Sample, sample_for

__all__ = [
    "BOUNDS",
    "Bound",
    "LiveRuntime",
    "Proof",
    "ProofError",
    "Recorded",
    "Runtime",
    "Sample",
    "compare",
    "prove",
    "sample_for",
]
