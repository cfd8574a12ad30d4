"""Dialogs as token ids with labels on the answers only."""

from __future__ import annotations

import importlib.util
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastplug.demo.config import DemoError
from fastplug.errors import MissingExtra

if TYPE_CHECKING:
    import torch

IGNORED = -100
QUESTION = "Hi, my printer does not print anymore."  # not in the corpus, which has "My printer is not printing."

Row = Mapping[str, Any]
Segment = tuple[str, bool]  # text, and whether its tokens are learnt


@dataclass(frozen=True)
class Example:
    """One dialog: token ids and, of the same length, labels (``IGNORED`` at what is not learnt)."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


def corpus() -> list[Row]:
    """The English dialogs of chatterbot-corpus, as ``messages``.

    Only the opening pair of each is taken: in some files the later lines are further turns, in others they are further
    answers to the same question.

    Raises:
        MissingExtra: chatterbot-corpus or PyYAML is not installed.
    """
    found = importlib.util.find_spec("chatterbot_corpus")
    if found is None or not found.submodule_search_locations:
        raise MissingExtra("chatterbot-corpus", "demo", "the demo's default data")
    try:
        import yaml
    except ImportError as error:
        raise MissingExtra("pyyaml", "demo", "reading the demo's default data") from error
    rows: list[Row] = []
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for file in sorted(Path(found.submodule_search_locations[0], "data", "english").glob("*.yml")):
        dialogs = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)["conversations"]
        rows += [{"messages": _turns(*map(str, lines[:2]))} for lines in dialogs if len(lines) >= 2]
    return rows


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a JSON-lines file.

    Raises:
        DemoError: The file is missing, a line is not JSON, or a row has none of the known shapes; names the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"fastplug demo: cannot read the data {os.fspath(path)!r}: {error}") from error
    rows: list[Row] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DemoError(f"fastplug demo: {os.fspath(path)}, line {number} is not JSON ({error.msg})") from error
        if not _known_shape(row):
            raise DemoError(
                f"fastplug demo: {os.fspath(path)}, line {number} needs 'messages' (a list of role and content that "
                "has an assistant's turn), or 'prompt' and 'completion', or 'text'"
            )
        rows.append(row)
    if not rows:
        raise DemoError(f"fastplug demo: {os.fspath(path)} has no rows")
    return rows


def asked(question: str) -> Row:
    """A row that asks ``question`` and leaves the answer open."""
    return {"messages": _turns(question, "")}


def segments(row: Row, tokenizer: Any) -> list[Segment]:
    """A row as the texts that the model reads, each with whether it is learnt.

    Of ``messages`` every assistant turn is learnt with the end-of-turn mark that the chat template puts after it; of
    ``prompt`` and ``completion`` the completion; of ``text`` all.

    Raises:
        DemoError: The chat template writes a turn differently once another follows, so that answers have no place of
            their own in it.
    """
    end = tokenizer.eos_token or ""
    if "text" in row:
        return [(row["text"] + end, True)]
    if "messages" in row:
        return _chat(list(row["messages"]), 0, tokenizer)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        return [(prompt, False), (completion + end, True)]
    return _chat([*prompt, *completion], len(prompt), tokenizer)


def opening(row: Row, tokenizer: Any) -> tuple[str, str]:
    """What to ask a model that learns such rows: for a person to read, and as the model reads it."""
    if "text" in row:
        text = " ".join(row["text"].split()[:8])
        return text, text
    turns = row.get("messages", row.get("prompt"))
    asked = turns if isinstance(turns, str) else next((t["content"] for t in turns if t["role"] == "user"), "")
    unlearnt = ""
    for text, learnt in segments(row, tokenizer):
        if learnt:
            break
        unlearnt += text
    return asked.strip(), unlearnt


def encode(row: Row, tokenizer: Any) -> Example:
    """Token ids and labels of a row. Each segment is tokenized by itself, so no token straddles two."""
    ids, labels = [], []
    if not (getattr(tokenizer, "chat_template", None) and "messages" in row):
        ids += starting_ids(tokenizer)
        labels += [IGNORED] * len(ids)
    for text, learnt in segments(row, tokenizer):
        part = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += part
        labels += part if learnt else [IGNORED] * len(part)
    return Example(tuple(ids), tuple(labels))


def starting_ids(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token where the tokenizer puts one before plain text. A chat template has its own."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first and first[0] == tokenizer.bos_token_id else []


def encode_all(rows: Sequence[Row], tokenizer: Any, max_length: int) -> tuple[list[Example], int]:
    """The examples of at most ``max_length`` tokens, and how many were longer.

    Raises:
        DemoError: None fits.
    """
    examples = [encode(row, tokenizer) for row in rows]
    fitting = [example for example in examples if len(example.input_ids) <= max_length]
    if not fitting:
        shortest = min(len(example.input_ids) for example in examples)
        raise DemoError(
            f"fastplug demo: all {len(examples)} rows are longer than {max_length} tokens, the shortest has "
            f"{shortest}; raise --max-length"
        )
    return fitting, len(examples) - len(fitting)


class Collator:
    """Pads examples on the right to the longest of a batch, and keeps count of what it made.

    Attributes:
        tokens: Unpadded tokens of each batch so far.
        checksums: CRC-32 of each batch's padded token ids.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id
        self.tokens: list[int] = []
        self.checksums: list[int] = []

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, each int64 [len(examples), longest]."""
        import torch

        lengths = [len(example.input_ids) for example in examples]
        ids = torch.full((len(examples), max(lengths)), self.pad_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, (example, length) in enumerate(zip(examples, lengths)):
            ids[row, :length] = torch.tensor(example.input_ids)
            labels[row, :length] = torch.tensor(example.labels)
            mask[row, :length] = 1
        self.tokens.append(sum(lengths))
        self.checksums.append(zlib.crc32(ids.numpy().tobytes()))
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _known_shape(row: object) -> bool:
    if not isinstance(row, Mapping):
        return False
    if isinstance(row.get("text"), str):
        return bool(row["text"].strip())
    if "messages" in row:
        return _is_chat(row["messages"]) and any(turn["role"] == "assistant" for turn in row["messages"])
    pair = row.get("prompt"), row.get("completion")
    return all(isinstance(part, str) and part for part in pair) or all(_is_chat(part) for part in pair)


def _is_chat(turns: object) -> bool:
    return (
        isinstance(turns, list)
        and len(turns) > 0
        and all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in turns)
        and all(isinstance(turn["content"], str) for turn in turns)
    )


def _chat(messages: list[dict[str, str]], learn_from: int, tokenizer: Any) -> list[Segment]:
    """``messages`` by the chat template, split at the beginning and the end of each assistant turn that is learnt."""
    if not getattr(tokenizer, "chat_template", None):
        return list(_plain_chat(messages, learn_from, tokenizer.eos_token or ""))
    parts: list[Segment] = []
    written = ""
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant" or index < learn_from:
            continue
        for turns, learnt in ((messages[:index], False), (messages[: index + 1], True)):
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not learnt)
            if not text.startswith(written):
                raise DemoError(
                    "fastplug demo: the model's chat template rewrites earlier turns when a later one is added, so its "
                    "answers cannot be told apart; give the data as 'prompt' and 'completion'"
                )
            parts.append((text[len(written) :], learnt))
            written = text
    return parts


def _plain_chat(messages: list[dict[str, str]], learn_from: int, end: str) -> Iterator[Segment]:
    """For a model without a chat template: ``User: ...`` and ``Assistant: ...``, one turn a line."""
    for index, turn in enumerate(messages):
        learnt = turn["role"] == "assistant" and index >= learn_from
        yield f"{turn['role'].capitalize()}:", False
        yield f" {turn['content']}{end if learnt else ''}\n", learnt


__all__ = ["Collator", "Example", "Row", "asked", "corpus", "encode", "encode_all", "opening", "read_rows", "segments"]
