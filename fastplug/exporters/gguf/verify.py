"""The proof of a GGUF file: its tokens and its logits in libllama against the live model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastplug.errors import MissingExtra
from fastplug.exporters.api import ExportError
from fastplug.exporters.gguf.types import FileType
from fastplug.exporters.libllama import LibLlama
from fastplug.exporters.models import base_of, quantizes_activations
from fastplug.exporters.proof import BOUNDS, Bound, LiveRuntime, Proof, Recorded, prove
from fastplug.exporters.proof.reload import sample_of
from fastplug.exporters.proof.sample import PROMPTS, TEXTS

_SPACED = "  two  spaces, a\ttab,\n\na blank line, 12345678 and 3.14, naïve café, 日本語, don't we'LL 🙂"


class _File:
    """A GGUF file as a runtime of a proof."""

    def __init__(self, llama: LibLlama, file: Path) -> None:
        self.name = f"{file.name} in libllama"
        self._llama = llama

    def logits(self, token_ids: Tensor) -> Tensor:
        return self._llama.logits(token_ids)


def prove_files(
    llama: LibLlama,
    model: Any,
    files: Mapping[FileType, Path],
    tokenizer: Any,
    *,
    adapters: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    original: bool = False,
    length: int = 256,
    lora: Path | None = None,
) -> dict[str, Proof]:
    """Run each file on the same tokens as the live model.

    Args:
        llama: libllama.
        model: The live model.
        files: The files by their type.
        tokenizer: The live tokenizer.
        adapters: Adapters of ``model`` to run with; None: the active ones.
        texts: Held-out text; default: a few short passages.
        original: Whether the weights come from the original base and not from the one that the adapter was trained on.
        length: Longest sequence in tokens.
        lora: An adapter that libllama puts on each file.

    Returns:
        The proofs by file name.

    Raises:
        ProofError: A file outside of its bound.
        ExportError: A file that libllama cannot load, or whose tokenizer gives other tokens.
    """
    base = base_of(model)
    sample = sample_of(base, tokenizer, texts)
    live = Recorded(LiveRuntime(model, adapters))
    proofs = {}
    for index, (row, file) in enumerate(files.items()):
        # Keys and values in fp16 are what libllama's programs use, but they would hide what an exact file is.
        llama.load(file, lora=lora, length=max(length, 2), exact=True)
        if index == 0:
            compare_tokens(llama, tokenizer, (*PROMPTS, *TEXTS, _SPACED, *(texts or ())))
        proofs[file.name] = prove(live, _File(llama, file), sample, _bound(row, base, original))
    return proofs


def _bound(row: FileType, base: Any, original: bool) -> Bound:
    bound = row.bound
    if original:
        bound = bound.widened(BOUNDS["onto the original base"])
    return bound.widened(BOUNDS["8-bit activations"]) if quantizes_activations(base) else bound


def compare_tokens(llama: LibLlama, tokenizer: Any, texts: Sequence[str]) -> None:
    """Raise :class:`ExportError` if the file's tokenizer cuts a text or an added token otherwise than the live one."""
    for text in texts:
        ours, theirs = tokenizer(text, add_special_tokens=False)["input_ids"], llama.tokenize(text)
        if list(ours) != theirs:
            place = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
            raise ExportError(
                f"fastplug: the tokenizer in the file gives other tokens than the live one from token {place} on, "
                f"{llama.detokenize(theirs[place : place + 3], special=True)!r} for "
                f"{tokenizer.decode(ours[place : place + 3])!r}; if you named it with pre_tokenizer=, name another one"
            )
    for token, index in tokenizer.get_added_vocab().items():
        if index < llama.vocabulary and token.strip() == token and llama.tokenize(token) != [index]:
            raise ExportError(f"fastplug: the file lost the added token {token!r} ({index}): libllama cuts it up")


def fallbacks(file: Path, row: FileType) -> list[str]:
    """A note on the tensors whose rows do not fit the type's blocks, with the types that libllama gave them."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtra("gguf", "gguf", "reading a GGUF file") from error
    given: dict[str, list[str]] = {}
    for tensor in GGUFReader(file).tensors:
        if len(tensor.shape) > 1 and tensor.shape[0] % row.block and tensor.tensor_type.name not in ("F32", "F16"):
            given.setdefault(f"{tensor.shape[0]} wide, {tensor.tensor_type.name}", []).append(tensor.name)
    if not given:
        return []
    parts = [f"{len(names)} x {kind} ({names[0]}, ...)" for kind, names in given.items()]
    total = sum(map(len, given.values()))
    return [
        f"{row.name}: {total} tensors have rows that are no multiple of {row.block} and got another type: "
        f"{'; '.join(parts)}."
    ]
