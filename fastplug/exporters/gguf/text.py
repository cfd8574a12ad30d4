"""The user's text: for the importance matrix, and held out from it for the proof."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastplug.errors import OptionError


def read_texts(data: str | os.PathLike[str] | Iterable[Any], tokenizer: Any) -> list[str]:
    """Texts of a file or a list.

    Args:
        data: A text file (paragraphs are separated by empty lines), JSON lines with ``text``, ``messages`` or
            ``prompt`` and ``completion``, or such rows as a list of strings and dicts.
        tokenizer: Whose chat template puts messages into one text.

    Raises:
        OptionError: No such file, or a row of another kind.
    """
    if isinstance(data, (str, os.PathLike)):
        file = Path(data)
        if not file.is_file():
            raise OptionError(f"fastplug: data= is a text file, JSON lines or a list of texts; there is no file {file}")
        content = file.read_text(encoding="utf-8")
        if file.suffix in (".jsonl", ".json"):
            rows: list[Any] = [_json(line, file) for line in content.splitlines() if line.strip()]
        else:
            rows = [part.strip() for part in content.split("\n\n")]
    else:
        rows = list(data)
    texts = [text for text in (_text(row, tokenizer) for row in rows) if text]
    if not texts:
        raise OptionError("fastplug: data= holds no text")
    return texts


def _json(line: str, file: Path) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise OptionError(f"fastplug: {file} is not JSON lines ({error})") from error


def _text(row: Any, tokenizer: Any) -> str:
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return str(row["text"])
        if isinstance(row.get("messages"), list):
            return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
        if isinstance(row.get("prompt"), str):
            return str(row["prompt"]) + str(row.get("completion", ""))
    raise OptionError("fastplug: a row of data= is a text, or has 'text', 'messages' or 'prompt'")


def split_texts(texts: list[str], share: int = 5, most: int = 8) -> tuple[list[str], list[str]]:
    """Text to calibrate on, and text held out from it: every ``share``-th row, ``most`` at most."""
    held = texts[:: max(share, 2)][:most] if len(texts) > 1 else []
    return [text for text in texts if text not in held] or texts, held


def sequences(texts: list[str], tokenizer: Any, *, length: int, tokens: int) -> list[Tensor]:
    """Token ids of about ``tokens`` tokens of ``texts``, in sequences of ``length``: int64 ``[length]`` each."""
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False)["input_ids"] + separator
        if len(stream) >= tokens:
            break
    parts = (stream[begin : begin + length] for begin in range(0, min(len(stream), tokens), length))
    return [torch.tensor(part, dtype=torch.int64) for part in parts if len(part) > 1]
