"""The tokens that a proof runs on: a few prompts, and held-out text for the perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "def fibonacci(n):\n    ",
    "Translate to German: The weather is nice today.",
)

# Written for this file, so that no model has been trained on it.
TEXTS = (
    "The ferry left the harbour an hour late because the captain had lent his keys to his brother, who had gone to the "
    "market to buy bread and had stayed to argue about football. Nobody on board complained. The morning was warm, the "
    "gulls were busy behind the fish hall, and a woman in a yellow coat handed out slices of melon to the children.",
    "To repair a bicycle tyre, take the wheel off and lift one side of the tyre over the rim with two levers. Pull the "
    "tube out, pump it up a little, and hold it under water until you see where the bubbles rise. Dry the place, sand "
    "it, spread the glue thinly, and wait five minutes before you press the patch on.",
    "In the second year of the survey the number of nesting pairs fell from 214 to 180, while the water level stayed "
    "within ten centimetres of its average. We compared three explanations: predation by rats, a late frost in April, "
    "and the new footpath along the western bank. Only the first was consistent with the pattern of losses.",
    "def read_table(path):\n    rows = []\n    with open(path) as file:\n        header = file.readline().split(',')\n"
    "        for line in file:\n            rows.append(dict(zip(header, line.split(','))))\n    return rows\n",
)


@dataclass(frozen=True)
class Sample:
    """Token ids, int64 ``[length]`` each.

    Attributes:
        prompts: What the runtimes are compared on.
        texts: The same, and the perplexity is measured on them.
        description: Where they come from, for people.
    """

    prompts: tuple[Tensor, ...]
    texts: tuple[Tensor, ...]
    description: str = ""

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in (*self.prompts, *self.texts))


def sample_for(
    tokenizer: Any,
    vocabulary: int,
    *,
    texts: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    length: int = 256,
) -> Sample:
    """The sample for a model.

    Args:
        tokenizer: Its tokenizer; None: random token ids stand in for text, which measures the same weights but gives a
            perplexity without meaning.
        vocabulary: How many token ids the model knows.
        texts: Held-out text, best of the kind that the adapter was trained on; default: four short passages.
        prompts: Default: five short ones. With a chat template they become a user's turn.
        length: Longest sequence in tokens; also what the model's positions allow.
    """
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        size = min(length, 32)
        rows = torch.randint(0, vocabulary, (6, size), generator=generator)
        return Sample(tuple(rows[:2]), tuple(rows[2:]), "random tokens (no tokenizer was given)")
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    encoded = [_chat(inner, prompt) for prompt in (PROMPTS if prompts is None else prompts)]
    plain = [inner(text)["input_ids"] for text in (TEXTS if texts is None else texts)]
    return Sample(
        tuple(_ids(ids, vocabulary, length) for ids in encoded if ids),
        tuple(_ids(ids, vocabulary, length) for ids in plain if len(ids) > 1),
        "built-in prompts and text" if texts is None else f"{len(plain)} given texts",
    )


def _chat(tokenizer: Any, prompt: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(prompt)["input_ids"])


def _ids(ids: Sequence[int], vocabulary: int, length: int) -> Tensor:
    made = torch.tensor(list(ids)[:length], dtype=torch.int64)
    return made.clamp_(max=vocabulary - 1)


__all__ = ["PROMPTS", "TEXTS", "Sample", "sample_for"]
