"""The part of Go's ``text/template`` that Ollama's chat templates are written in, evaluated in Python.

It checks a translated template by rendering it. Text, ``{{- trim -}}``, comments, ``if``/``else if``/``else``,
``range``, ``with``, ``$variables``, ``.fields``, string and number literals, parentheses, pipes, and the functions
``eq ne lt le gt ge not and or len slice index print``. Anything else raises :class:`Unsupported`; nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_ACTION = re.compile(r"\{\{(- )?((?:\"(?:\\.|[^\"\\])*\"|`[^`]*`|/\*.*?\*/|(?!\}\}).)*?)( -)?\}\}", re.DOTALL)
_TOKEN = re.compile(
    r"\s*(\"(?:\\.|[^\"\\])*\"|`[^`]*`|:=|=|\||\(|\)|,|-?\d+|\$?[A-Za-z_]\w*|\$|\.[A-Za-z_]\w*|\.)", re.DOTALL
)


class Unsupported(ValueError):
    """A construct that this evaluator does not know."""


def _slice(value: Any, *bounds: int) -> Any:
    return value[slice(*bounds)] if len(bounds) == 2 else value[bounds[0] :]


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda first, second: first != second,
    "lt": lambda first, second: first < second,
    "le": lambda first, second: first <= second,
    "gt": lambda first, second: first > second,
    "ge": lambda first, second: first >= second,
    "not": lambda value: not value,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "len": len,
    "slice": _slice,
    "index": lambda value, key: value[key],
    "print": lambda *values: "".join(_printed(value) for value in values),
}


def render(template: str, values: Mapping[str, Any]) -> str:
    """What Go would print for ``template`` on ``values``; a missing field is empty, as Ollama asks for.

    Raises:
        Unsupported: The template uses what this evaluator does not know, or is not well formed.
    """
    nodes, rest = _parse(list(_pieces(template)), ())
    if rest:
        raise Unsupported(f"{{{{ {rest[0][1]} }}}} without a beginning")
    out: list[str] = []
    try:
        _run(nodes, values, _Scope({"$": values}), out)
    except (TypeError, IndexError, KeyError) as error:
        raise Unsupported(str(error)) from error
    return "".join(out)


class _Scope:
    """Variables: ``:=`` makes one in the innermost scope, ``=`` changes the nearest."""

    def __init__(self, values: dict[str, Any], outer: _Scope | None = None) -> None:
        self.values, self.outer = values, outer

    def get(self, name: str) -> Any:
        if name in self.values:
            return self.values[name]
        if self.outer is None:
            raise Unsupported(f"undefined variable {name}")
        return self.outer.get(name)

    def assign(self, name: str, value: Any) -> None:
        if name in self.values:
            self.values[name] = value
        elif self.outer is None:
            raise Unsupported(f"undefined variable {name}")
        else:
            self.outer.assign(name, value)


def _pieces(template: str) -> Iterator[tuple[str, str]]:
    """Text and actions in turn, with the white space around ``{{-`` and ``-}}`` gone."""
    at, trim = 0, False
    for match in _ACTION.finditer(template):
        text = template[at : match.start()]
        text = text.lstrip() if trim else text
        yield "text", text.rstrip() if match[1] else text
        if not match[2].lstrip().startswith("/*"):
            yield "action", match[2].strip()
        at, trim = match.end(), bool(match[3])
    yield "text", template[at:].lstrip() if trim else template[at:]


def _parse(pieces: list[tuple[str, str]], ends: tuple[str, ...]) -> tuple[list[Any], list[tuple[str, str]]]:
    """Nodes up to an action that begins with one of ``ends``, and the pieces from that action on."""
    nodes: list[Any] = []
    while pieces:
        kind, text = pieces[0]
        word = text.split(None, 1)[0] if text.split() else ""
        if kind == "text":
            nodes.append(("text", text))
            pieces = pieces[1:]
        elif word in ("end", "else"):
            if word not in ends:
                raise Unsupported(f"{{{{ {text} }}}} without a beginning")
            return nodes, pieces
        elif word in ("if", "range", "with"):
            node, pieces = _parse_block(word, text[len(word) :].strip(), pieces[1:])
            nodes.append(node)
        elif word in ("define", "template", "block", "break", "continue"):
            raise Unsupported(f"{{{{ {word} }}}}")
        else:
            nodes.append(("action", text))
            pieces = pieces[1:]
    if ends:
        raise Unsupported("a block without {{ end }}")
    return nodes, pieces


def _parse_block(word: str, head: str, pieces: list[tuple[str, str]]) -> tuple[Any, list[tuple[str, str]]]:
    body, pieces = _parse(pieces, ("end", "else"))
    following = pieces[0][1]
    if following == "end":
        return (word, head, body, []), pieces[1:]
    if following == "else":
        otherwise, pieces = _parse(pieces[1:], ("end",))
        return (word, head, body, otherwise), pieces[1:]
    inner, _, condition = following.removeprefix("else").strip().partition(" ")
    if inner != "if":
        raise Unsupported(f"{{{{ {following} }}}}")
    nested, pieces = _parse_block("if", condition.strip(), pieces[1:])  # its end is ours as well
    return (word, head, body, [nested]), pieces


def _run(nodes: list[Any], dot: Any, scope: _Scope, out: list[str]) -> None:
    for node in nodes:
        if node[0] == "text":
            out.append(node[1])
        elif node[0] == "action":
            value, assigned = _statement(node[1], dot, scope)
            if not assigned:
                out.append(_printed(value))
        elif node[0] == "range":
            _run_range(node, dot, scope, out)
        else:
            inner = _Scope({}, scope)
            value, _ = _statement(node[1], dot, inner)
            if value:
                _run(node[2], value if node[0] == "with" else dot, inner, out)
            else:
                _run(node[3], dot, inner, out)


def _run_range(node: Any, dot: Any, scope: _Scope, out: list[str]) -> None:
    names, separator, expression = node[1].rpartition(":=")
    variables = [name.strip() for name in names.split(",")] if separator else []
    items = _evaluate(expression, dot, scope) or []
    for index, item in enumerate(items):
        bound = dict(zip(variables, (index, item))) if len(variables) == 2 else dict.fromkeys(variables, item)
        _run(node[2], item, _Scope(bound, scope), out)
    if not items:
        _run(node[3], dot, _Scope({}, scope), out)


def _statement(text: str, dot: Any, scope: _Scope) -> tuple[Any, bool]:
    if match := re.match(r"(\$\w+)\s*(:?=)\s*(.*)", text, re.DOTALL):
        value = _evaluate(match[3], dot, scope)
        if match[2] == ":=":
            scope.values[match[1]] = value
        else:
            scope.assign(match[1], value)
        return value, True
    return _evaluate(text, dot, scope), False


def _evaluate(text: str, dot: Any, scope: _Scope) -> Any:
    tokens, at = [], 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            raise Unsupported(f"{{{{ {text} }}}}")
        # ".Field" right behind something is a field of it, behind a space an argument of its own.
        joined = match[1].startswith(".") and len(match[1]) > 1 and at > 0 and match.start(1) == at
        tokens.append(("field " if joined else "") + match[1])
        at = match.end()
    value, rest = _pipe(tokens, dot, scope)
    if rest:
        raise Unsupported(f"{{{{ {text} }}}}")
    return value


def _pipe(tokens: list[str], dot: Any, scope: _Scope) -> tuple[Any, list[str]]:
    value, tokens = _command(tokens, dot, scope, [])
    while tokens and tokens[0] == "|":
        value, tokens = _command(tokens[1:], dot, scope, [value])
    return value, tokens


def _command(tokens: list[str], dot: Any, scope: _Scope, piped: list[Any]) -> tuple[Any, list[str]]:
    if not tokens:
        raise Unsupported("an empty action")
    name = tokens[0]
    if re.fullmatch(r"[A-Za-z_]\w*", name) and name not in ("true", "false", "nil"):
        if name not in _FUNCTIONS:
            raise Unsupported(f"the function {name}")
        arguments, tokens = [], tokens[1:]
        while tokens and tokens[0] not in ("|", ")"):
            value, tokens = _operand(tokens, dot, scope)
            arguments.append(value)
        return _FUNCTIONS[name](*arguments, *piped), tokens
    if piped:
        raise Unsupported(f"a pipe into {name}")
    return _operand(tokens, dot, scope)


def _operand(tokens: list[str], dot: Any, scope: _Scope) -> tuple[Any, list[str]]:
    token, tokens = tokens[0], tokens[1:]
    if token == "(":
        value, tokens = _pipe(tokens, dot, scope)
        if not tokens or tokens[0] != ")":
            raise Unsupported("a parenthesis without an end")
        tokens = tokens[1:]
    elif token.startswith('"'):
        value = json.loads(token, strict=False)
    elif token.startswith("`"):
        value = token[1:-1]
    elif token == ".":
        value = dot
    elif token.startswith("."):
        value = _field(dot, token[1:])
    elif token.startswith("$"):
        value = scope.get(token)
    elif token in ("true", "false", "nil"):
        value = {"true": True, "false": False, "nil": None}[token]
    elif re.fullmatch(r"-?\d+", token):
        value = int(token)
    else:
        raise Unsupported(token)
    while tokens and tokens[0].startswith("field ."):
        value, tokens = _field(value, tokens[0].removeprefix("field .")), tokens[1:]
    return value, tokens


def _field(value: Any, name: str) -> Any:
    return value.get(name, "") if isinstance(value, Mapping) else ""


def _printed(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
