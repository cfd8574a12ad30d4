"""What the source of a module's class says about its projections: which of them read one tensor."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Sequence

Group = tuple[str, ...]
BLOCKS = ("body", "orelse", "finalbody", "handlers")


def shared_inputs(kind: type, names: Sequence[str]) -> tuple[Group, ...]:
    """``names``, attributes of an instance, in groups that the class's methods call on one variable.

    A variable that is assigned in between ends a group, as far as the order of the lines tells; so a group is a guess.
    Those that are called on an expression, several times or nowhere stand alone. Without source, all of them do.
    """
    calls = [call for call in _calls(kind) if call[0] in names]
    often = {name for name, _ in calls if [other for other, _ in calls].count(name) > 1}
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys([*(name for name, _ in calls), *names]):
        variable = next((variable for other, variable in calls if other == name), None)
        alone = variable is None or name in often
        groups.setdefault(f"alone {name}" if alone else str(variable), []).append(name)
    return tuple(tuple(group) for group in groups.values())


@functools.cache
def _calls(kind: type) -> tuple[tuple[str, str | None], ...]:
    """(attribute, variable) of every ``self.attribute(variable)``, in the order of the lines.

    A variable that is assigned anew gets another name. It is None where the argument is an expression.
    """
    found: list[tuple[str, str | None]] = []
    for name, function in inspect.getmembers(kind, inspect.isfunction):
        if function.__module__.startswith("torch."):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
        except (OSError, TypeError, SyntaxError):
            continue
        versions: dict[str, int] = {}
        for node in _statements(tree):
            for call in _in_order(node):
                if isinstance(call, ast.Call) and _attribute(call.func) is not None:
                    variable = call.args[0].id if len(call.args) == 1 and isinstance(call.args[0], ast.Name) else None
                    if variable is not None and not call.keywords:
                        variable = f"{name}: {variable} {versions.get(variable, 0)}"
                    else:
                        variable = None
                    found.append((str(_attribute(call.func)), variable))
            for target in ast.walk(node):
                if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                    versions[target.id] = versions.get(target.id, 0) + 1
    return tuple(found)


def _attribute(function: ast.expr) -> str | None:
    """The ``name`` of ``self.name``."""
    own = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "self"
    return function.attr if own else None  # type: ignore[attr-defined]


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """The simple statements, and the conditions of the others, in the order of the lines."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.stmt) and any(hasattr(child, block) for block in BLOCKS):
            yield from _statements(child)
        elif isinstance(child, (ast.stmt, ast.expr)):
            yield child
        else:
            yield from _statements(child)


def _in_order(node: ast.AST) -> list[ast.AST]:
    return sorted(ast.walk(node), key=lambda part: (getattr(part, "lineno", 0), getattr(part, "col_offset", 0)))
