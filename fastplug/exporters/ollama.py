"""``ollama``: a GGUF file and the Modelfile that ``ollama create`` makes a model of."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastplug.errors import OptionError
from fastplug.exporters.api import ExportError, ExportResult
from fastplug.exporters.chat_template import (
    Unsupported,
    check,
    conversations,
    ollama_values,
    renderer,
    translate,
)
from fastplug.exporters.gguf.export import Written, export_files, file_name
from fastplug.exporters.gguf.types import parse_types
from fastplug.exporters.go_template import render

_CONTEXT = 8192  # Ollama reserves the memory of the whole context at once
# of a generation config, and what Ollama calls it
_PARAMETERS = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty", "max_new_tokens": "num_predict",
}  # fmt: skip


def ollama(
    model: Any,
    path: str | os.PathLike[str],
    *,
    types: str = "q4_k_m",
    template: str | None = None,
    system: str | None = None,
    parameters: dict[str, Any] | None = None,
    adapter: str | Sequence[str] | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    quant: str | None = None,
    tokenizer: Any = None,
    data: str | os.PathLike[str] | Iterable[Any] | None = None,
    texts: Sequence[str] | None = None,
    name: str | None = None,
    pre_tokenizer: str | None = None,
    llama_cpp: str | os.PathLike[str] | None = None,
    libllama: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> ExportResult:
    """Write a model with its adapter merged in as a GGUF file, and a ``Modelfile`` for it.

    The Modelfile's template is the model's own chat template in Ollama's language, checked by rendering both; its
    stop words are the tokens that end a turn, its parameters those of the generation config.

    Args:
        model, path, adapter, base, quant, tokenizer, data, texts, name, pre_tokenizer, llama_cpp, libllama, threads,
            overwrite, verify: As for :func:`~fastplug.exporters.gguf.export.gguf`.
        types: The type of the file, one.
        template: A template of your own in Ollama's language, instead of a translation.
        system: A system message that Ollama uses where a conversation has none.
        parameters: More ``PARAMETER`` lines, or other values for them: ``{"num_ctx": 16384}``.

    Raises:
        ExportError: A chat template that cannot be translated; and what ``gguf`` raises, as the other exceptions.
        OptionError: More than one type.
    """
    rows = parse_types(types)
    if len(rows) != 1:
        raise OptionError('fastplug: a Modelfile names one file, so types= is one type; format="gguf" writes several')

    def finish(written: Written) -> list[str]:
        (file,) = written.files.values()
        modelfile, notes = make_modelfile(written, file, template, system, parameters or {})
        (written.folder / "Modelfile").write_text(modelfile, encoding="utf-8")
        return [*notes, f"Next: ollama create {file_name(name or file.stem).lower()} -f Modelfile, in the folder."]

    return export_files(
        model, path, "ollama", rows, adapter=adapter, base=base, quant=quant, tokenizer=tokenizer, data=data,
        texts=texts, name=name, pre_tokenizer=pre_tokenizer, llama_cpp=llama_cpp, libllama=libllama, threads=threads,
        overwrite=overwrite, verify=verify, finish=finish,
    )  # fmt: skip


def make_modelfile(
    written: Written, file: Path, template: str | None, system: str | None, parameters: dict[str, Any]
) -> tuple[str, list[str]]:
    """The Modelfile of ``file`` and notes for people.

    Raises:
        ExportError: There is no chat template, or it cannot be translated, or a text cannot be quoted.
    """
    tokenizer = written.tokenizer
    if not getattr(tokenizer, "chat_template", None) and template is None:
        raise ExportError(
            "fastplug: the tokenizer has no chat template to make a Modelfile of; pass template= (in Ollama's "
            'language), or use format="gguf"'
        )
    notes: list[str] = []
    bos = tokenizer.bos_token or ""
    added = bos if bos and _adds_bos(file) else ""
    source = renderer(tokenizer)
    if template is None:
        template, found = translate(source, added, tokenizer.eos_token or "")
        notes += found
        if "strftime_now" in str(tokenizer.chat_template):
            notes.append("The chat template writes today's date; in the Modelfile that stays the date of the export.")
        if added and not source([{"role": "user", "content": "a"}], True).startswith(added):
            notes.append(f"Ollama puts {added} before a prompt, which the model's chat template does not.")
        if written.llama is not None:
            _compare_tokens(written, template, added)
    elif getattr(tokenizer, "chat_template", None):
        try:
            notes += check(template, source, added)
        except Unsupported as error:
            notes.append(f"The given template was not checked against the chat template: it uses {error}.")
    lines = [f"FROM ./{file.name}", f'TEMPLATE """{_quotable(template)}"""']
    if system is not None:
        lines.append(f'SYSTEM """{_quotable(system)}"""')
    values = {**_generation_parameters(written.base), **parameters}
    lines += [f"PARAMETER {key} {_value(value)}" for key, value in values.items()]
    lines += [f'PARAMETER stop "{stop}"' for stop in stop_words(tokenizer, written.base) if '"' not in stop]
    return "\n".join(lines) + "\n", notes


def _adds_bos(file: Path) -> bool:
    """Whether a runtime puts a beginning-of-sequence token before what it reads from this file."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    given = fields.get("tokenizer.ggml.add_bos_token")
    if given is not None:
        return bool(given.contents())
    kind = fields.get("tokenizer.ggml.model")
    return kind is not None and kind.contents() == "llama"  # the default of SentencePiece vocabularies


def _compare_tokens(written: Written, template: str, bos: str) -> None:
    """Raise :class:`ExportError` if a prompt of Ollama is other tokens in libllama than the live tokenizer gives."""
    tokenizer, llama = written.tokenizer, written.llama
    assert llama is not None
    for messages in conversations()[:1]:
        text = bos + render(template, ollama_values(messages))
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        theirs = llama.tokenize(text)
        if list(ours) != theirs:
            raise ExportError("fastplug: the prompt that Ollama would make of a question is other tokens in the file")


def stop_words(tokenizer: Any, base: Any) -> list[str]:
    """The texts of the tokens that end a turn: those of the generation config, the tokenizer and the template."""
    config = getattr(base, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    wanted = list(ids) if isinstance(ids, (list, tuple)) else [ids]
    wanted += [tokenizer.eos_token_id]
    known = tokenizer.get_added_vocab()
    # The special token right behind an answer, where the template has one.
    answered = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "MarkOne"}]
    try:
        _, _, behind = renderer(tokenizer)(answered, False).partition("MarkOne")
    except Exception:  # no chat template, or one that wants more
        behind = ""
    wanted += [index for token, index in known.items() if token and behind.lstrip().startswith(token)]
    texts = (tokenizer.convert_ids_to_tokens(int(index)) for index in wanted if index is not None)
    return list(dict.fromkeys(str(text) for text in texts if text))


def _generation_parameters(base: Any) -> dict[str, Any]:
    config = getattr(base, "generation_config", None)
    given = config.to_diff_dict() if config is not None else {}
    found = {name: given[key] for key, name in _PARAMETERS.items() if given.get(key) is not None}
    text = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    longest = getattr(text, "max_position_embeddings", None)
    if longest:
        found["num_ctx"] = min(int(longest), _CONTEXT)
    return found


def _value(value: Any) -> str:
    text = str(value)
    if "\n" in text:
        return f'"""{_quotable(text)}"""'
    return f'"{text}"' if isinstance(value, str) else text


def _quotable(text: str) -> str:
    if '"""' in text or text.endswith('"'):
        raise ExportError('fastplug: a Modelfile cannot quote a text with """ in it or with a quote at its end')
    return text


__all__ = ["make_modelfile", "ollama", "stop_words"]
