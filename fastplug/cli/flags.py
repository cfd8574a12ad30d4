"""Every field of :class:`fastplug.Options` as a flag of the same name, made from the dataclass itself."""

from __future__ import annotations

import enum
import functools
import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from fastplug.errors import FastPlugError
from fastplug.options import Options


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Prepare a command: fill its ``options`` parameter from flags, and print errors on purpose as one sentence.

    An error that fastplug raises on purpose ends the command with status 2, without a traceback.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    own = [p.replace(annotation=hints[p.name]) for p in inspect.signature(function).parameters.values()]
    flags = _flags() if any(p.name == "options" for p in own) else []
    names = {flag.name for flag in flags}

    @functools.wraps(function)
    def run(**given: Any) -> Any:
        try:
            if flags:
                values = {name: _plain(given.pop(name)) for name in names}
                given["options"] = Options.of(values)
            return function(**given)
        except FastPlugError as error:
            typer.echo(_sentence(error), err=True)
            raise typer.Exit(2) from None

    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.name != "options"] + flags
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    del run.__dict__["__wrapped__"]  # typer would read the annotations there
    return run


def _flags() -> list[inspect.Parameter]:
    hints, help_of = typing.get_type_hints(Options), descriptions()
    made = []
    for field in fields(Options):
        kind, default = _command_line_type(field.name, hints[field.name]), field.default
        flag = "--" + field.name.replace("_", "-")
        if kind is bool:
            flag += "/--no-" + field.name.replace("_", "-")
        if isinstance(default, tuple):
            default = list(default)
        option = typer.Option(flag, help=help_of[field.name], rich_help_panel="Options of fastplug")
        annotation = Annotated[kind, option]  # type: ignore[valid-type]
        made.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return made


def descriptions() -> dict[str, str]:
    """Option name -> its description in the docstring of :class:`fastplug.Options`."""
    text = inspect.getdoc(Options) or ""
    text = re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"\1", text)  # cross-references of the documentation
    entries = re.split(r"\n +(\w+): ", text.partition("Attributes:")[2])[1:]
    found = {name: " ".join(value.split()).replace("``", "") for name, value in zip(entries[::2], entries[1::2])}
    return {field.name: found.get(field.name, "") for field in fields(Options)}


def _command_line_type(name: str, hint: Any) -> Any:
    """The annotation typer needs: choices as an enumeration, tuples as a flag that may be repeated."""
    arguments = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is Literal:
        return enum.Enum(name, {value: value for value in arguments}, type=str)
    if get_origin(hint) is tuple:
        return list[_command_line_type(name, arguments[0])]  # type: ignore[misc]
    if type(None) in get_args(hint):
        return _command_line_type(name, arguments[0]) | None
    return hint


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return value


def _sentence(error: FastPlugError) -> str:
    text = " ".join(str(error).split())
    return text if text.startswith("fastplug") else f"fastplug: {text}"
