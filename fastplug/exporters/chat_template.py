"""A chat template of transformers (Jinja) in Ollama's language (Go), by asking it instead of reading it.

Chat templates are programs of up to hundreds of lines, yet what nearly all of them do with a conversation without tools
is to put fixed text around its messages. So a few conversations are rendered whose messages are markers; the text
between the markers is what the Go template has to write. Whether that is all that the template does is then checked:
both are rendered on other conversations and must agree to the last character. A template that does more is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any

from fastplug.exporters.api import ExportError
from fastplug.exporters.go_template import Unsupported, render

Message = dict[str, str]
Render = Callable[[Sequence[Message], bool], str]

SYSTEM = "Answer briefly.\nUse {{ plain }} words."
QUESTIONS = ("What is the capital of France?", 'Why?\n\nSay it in "one" sentence, please.', "Und auf Deutsch: schön?")
ANSWERS = ("Paris.", "Because it is.\n\n- so they say {% if %}")


@dataclass(frozen=True)
class Turns:
    """The text around messages.

    Attributes:
        first: Before a first message by the user, where there is no system message.
        system: Before and behind a system message at the beginning; what is behind reaches up to the user's text.
        later_system: The same for a system message within the conversation.
        user: Before (other than the first time) and behind a user's text.
        assistant: The same for the model's.
        generation: What comes last and asks for an answer.
        notes: What the Go template does otherwise.
    """

    first: str
    system: tuple[str, str]
    later_system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str
    notes: list[str] = field(default_factory=list)


def renderer(tokenizer: Any) -> Render:
    """The tokenizer's own rendering: messages and whether an answer is asked for, to text."""

    def run(messages: Sequence[Message], ask: bool) -> str:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
        return text

    return run


def translate(source: Render, bos: str = "", eos: str = "") -> tuple[str, list[str]]:
    """A Go template that writes what ``source`` writes.

    Args:
        source: The Jinja template, as a function.
        bos: What the runtime puts before every prompt itself; the Go template then leaves it out.
        eos: The end-of-sequence token, which some templates put behind a conversation that is complete.

    Returns:
        The template and notes for people.

    Raises:
        ExportError: The template does more than put text around messages, with the first difference.
    """
    turns = _probe(source, eos)
    if turns is None:
        raise _refusal("it does not keep the messages of a plain conversation apart and in order")
    template = go_template(turns, bos)
    return template, turns.notes + check(template, source, bos)


def _probe(source: Render, eos: str) -> Turns | None:
    marks = ["MarkOne", "MarkTwo", "MarkThree", "MarkFour"]
    user, assistant, system = "user", "assistant", "system"

    def parts(*roles: str, ask: bool = True) -> list[str] | None:
        text = source([{"role": role, "content": mark} for role, mark in zip(roles, marks)], ask)
        found = []
        for mark in marks[: len(roles)]:
            before, mark, text = text.partition(mark)
            if not mark:
                return None
            found.append(before)
        return [*found, text]

    try:
        talk = parts(user, assistant, user)
        alone, answered = parts(user, ask=False), parts(user, assistant, ask=False)
    except Exception as error:  # whatever a Jinja template may raise
        raise _refusal(f"it fails on a plain conversation ({error})") from error
    if talk is None or alone is None or answered is None:
        return None
    user_close, assistant_close = _close(alone[1], talk[1], eos), _close(answered[2], talk[2], eos)
    if not talk[3].startswith(user_close):
        return None
    user_open = talk[2].removeprefix(assistant_close)
    notes: list[str] = []
    instructed, later = _tried(parts, system, user), _tried(parts, user, assistant, system, user)
    if instructed is None:
        notes.append("The chat template has no system role; in Ollama a system message opens the user's first turn.")
        instructed = [talk[0], "\n\n", ""]
    if later is None or not later[2].startswith(assistant_close):
        later = ["", "", assistant_close + user_open, "\n\n", ""]
    spaced = source([{"role": user, "content": "  MarkOne  "}], True)
    if "  MarkOne  " not in spaced:
        notes.append("The chat template strips white space around messages, which Ollama's language cannot.")
    return Turns(
        first=talk[0],
        system=(instructed[0], instructed[1]),
        later_system=(later[2].removeprefix(assistant_close), later[3]),
        user=(user_open, user_close),
        assistant=(talk[1].removeprefix(user_close), assistant_close),
        generation=talk[3].removeprefix(user_close),
        notes=notes,
    )


def _close(end: str, between: str, eos: str) -> str:
    """What is behind a message both at the end of a conversation and in the middle.

    Where that ends within a word, the rest opens the next turn, and the whole is still the same text.
    """
    shorter = end.removesuffix(eos)
    if between.startswith(shorter) and not between.startswith(end):
        return shorter
    return commonprefix([end, between])  # noqa: RUF071 (characters are what it is for here)


def _tried(parts: Callable[..., list[str] | None], *roles: str) -> list[str] | None:
    try:
        return parts(*roles)
    except Exception:  # raise_exception() of the template, or a Jinja error
        return None


def go_template(turns: Turns, bos: str = "") -> str:
    """``turns`` in Ollama's language; ``.Messages`` holds all messages, those of the system too."""
    first, system_open = (text.removeprefix(bos) for text in (turns.first, turns.system[0]))
    text = _literal
    return (
        "{{ $opened := false }}{{ range $i, $m := .Messages }}"
        "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        '{{ if eq .Role "system" }}'
        f"{{{{ if $i }}}}{text(turns.later_system[0])}{{{{ .Content }}}}{text(turns.later_system[1])}"
        f"{{{{ else }}}}{text(system_open)}{{{{ .Content }}}}{text(turns.system[1])}{{{{ end }}}}"
        "{{ $opened = true }}"
        '{{ else if eq .Role "user" }}'
        f"{{{{ if $opened }}}}{{{{ $opened = false }}}}{{{{ else if $i }}}}{text(turns.user[0])}"
        f"{{{{ else }}}}{text(first)}{{{{ end }}}}"
        f"{{{{ .Content }}}}{text(turns.user[1])}"
        '{{ else if eq .Role "assistant" }}'
        f"{text(turns.assistant[0])}{{{{ .Content }}}}{{{{ if not $last }}}}{text(turns.assistant[1])}{{{{ end }}}}"
        "{{ end }}"
        f'{{{{ if and $last (ne .Role "assistant") }}}}{text(turns.generation)}{{{{ end }}}}'
        "{{ end }}"
    )


def _literal(text: str) -> str:
    """``text`` as Go prints it: as it is, unless it has braces or quotes that the template or Modelfile would read."""
    if "{{" in text or "}}" in text or '"""' in text or text.startswith("}") or text.endswith("{"):
        return "{{ " + json.dumps(text, ensure_ascii=False) + " }}"
    return text


def conversations() -> list[list[Message]]:
    """The sample conversations; the last one ends with the beginning of an answer."""
    system = {"role": "system", "content": SYSTEM}
    turns: list[Message] = []
    for question, answer in zip(QUESTIONS, (*ANSWERS, "")):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [turns[:1], turns[:3], turns[:5], [system, turns[0]], [system, *turns[:3]], [system, *turns[:5]], turns[:2]]


def check(template: str, source: Render, bos: str = "") -> list[str]:
    """Render ``template`` and ``source`` on the sample conversations; returns notes.

    Raises:
        ExportError: They differ, with the place.
        Unsupported: ``template`` uses what the evaluator does not know.
    """
    for messages in conversations():
        answering = messages[-1]["role"] == "assistant"
        try:
            expected = source(messages, not answering)
        except Exception:
            if messages[0]["role"] == "system":  # a template without that role; noted
                continue
            raise
        if answering:
            expected = expected[: expected.rindex(messages[-1]["content"]) + len(messages[-1]["content"])]
        expected = expected.removeprefix(bos)
        found = render(template, ollama_values(messages))
        if found != expected and answering:
            return ["An answer that Ollama is given the beginning of continues otherwise than in the chat template."]
        if found != expected:
            at = next((i for i, (a, b) in enumerate(zip(found, expected)) if a != b), min(len(found), len(expected)))
            roles = ", ".join(message["role"] for message in messages)
            raise _refusal(
                f"for the turns {roles} it writes {expected[at : at + 40]!r} where text around messages would be "
                f"{found[at : at + 40]!r}"
            )
    return []


def ollama_values(messages: Sequence[Message]) -> dict[str, Any]:
    """What Ollama gives a template for ``messages``."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    listed = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    return {"System": system, "Messages": listed, "Response": ""}


def _refusal(reason: str) -> ExportError:
    return ExportError(
        f"fastplug: this chat template cannot be translated to Ollama's language: {reason}. Pass a template of your "
        'own as template="...", or use format="gguf": llama.cpp runs the Jinja template inside the file'
    )


__all__ = ["Turns", "Unsupported", "check", "conversations", "go_template", "ollama_values", "renderer", "translate"]
