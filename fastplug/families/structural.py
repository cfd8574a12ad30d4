"""Rows that are read off a module's structure, for models that nobody wrote one for.

A guess is made from children, shapes and the module's source; it is kept only if the module's own forward gives the
same outputs and gradients on random input (``fastplug/patching/checking.py``). What the source does beside computing,
like counting its calls, speaks against it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastplug.families.reading import shared_inputs
from fastplug.families.row import Family, NormRow

NAME = "by structure, checked"
NO_CLASSES: dict[str, Any] = dict.fromkeys(("decoder_layer", "attention", "mlp", "norm", "lm_head_loss"))
EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps", "rms_norm_eps", "layer_norm_eps")


def guesses(module: nn.Module, role: str) -> Iterator[Family]:
    """Rows that may describe the module in the role, the likeliest first."""
    if role == "norm":
        yield from _norms(module)
    elif role == "mlp":
        yield from _mlps(module)
    elif role == "linear":
        yield from _projections(module)
    elif role == "lm_head_loss":
        yield row(type(module), role, trace_loss=True)


def roles_of(module: nn.Module) -> tuple[str, ...]:
    """The roles that a module of an unknown class might play, judged by what it holds, the best first."""
    kind = type(module)
    if kind.__module__.startswith(("torch.", "peft.", "bitsandbytes.")):
        return ()
    children = list(module.children())
    if not children:
        own = list(module.parameters(recurse=False))
        named = len(own) == 1 and own[0].dim() == 1 and "norm" in kind.__name__.lower()
        return ("norm",) if named and computes_only(_base(kind)) else ()
    parameters = inspect.signature(kind.forward).parameters
    roles = []
    if len(children) <= 6 and len(_linears(module)) in (2, 3) and len(parameters) == 2 and computes_only(_base(kind)):
        roles.append("mlp")
    if adapted(module):
        roles.append("linear")
    return tuple(roles)


def adapted(module: nn.Module) -> list[str]:
    """Names of the children that are linear layers with an adapter."""
    shapes = dict(_linears(module))
    return [
        name
        for name, child in module.named_children()
        if name in shapes and hasattr(child, "lora_A") and hasattr(getattr(child, "base_layer", None), "weight")
    ]  # experts under an adapter have several weights


def _projections(module: nn.Module) -> Iterator[Family]:
    names = adapted(module)
    shapes = dict(_linears(module))
    together = [
        tuple(name for name in group if shapes[name][1] == width)
        for group in shared_inputs(_base(type(module)), names)
        for width in dict.fromkeys(shapes[name][1] for name in group)
    ]
    alone = [(name,) for name in names]
    for groups in dict.fromkeys((tuple(together), tuple(alone))):
        yield row(type(module), "linear", shared=groups)


def row(kind: type, role: str, **values: Any) -> Family:
    """A row for one class in one role."""
    return Family(NAME, kind.__module__, "", class_names={**NO_CLASSES, role: kind.__qualname__}, **values)


def _base(kind: type) -> type:
    base: type = vars(kind).get("_fastplug_base", kind)
    return base


def _norms(module: nn.Module) -> Iterator[Family]:
    for name in EPSILONS:
        if isinstance(getattr(module, name, None), float):
            for offset in (0.0, 1.0):
                for cast_first in (True, False) if offset == 0.0 else (False, True):
                    norm = NormRow("rms", offset, cast_first, name)
                    yield row(type(module), "norm", norm=norm)
            yield row(type(module), "norm", norm=NormRow("layer", eps=name))


def _linears(module: nn.Module) -> list[tuple[str, tuple[int, int]]]:
    """(name, (out_features, in_features)) of the linear children, adapted or quantized ones among them."""
    found = []
    for name, child in module.named_children():
        linear = getattr(child, "base_layer", child)
        shape = (getattr(linear, "out_features", None), getattr(linear, "in_features", None))
        if isinstance(shape[0], int) and isinstance(shape[1], int):
            found.append((name, (shape[0], shape[1])))
    return found


def _mlps(module: nn.Module) -> Iterator[Family]:
    linears = _linears(module)
    others = [(name, child) for name, child in module.named_children() if name not in dict(linears)]
    activations = [name for name, child in others if not isinstance(child, (nn.Dropout, nn.Identity))]
    if any(isinstance(child, nn.Dropout) and child.p > 0 for _, child in others) or len(activations) != 1:
        return
    make = functools.partial(row, type(module), "mlp", activation=activations[0])
    shapes = dict(linears)
    for down, (out_features, in_features) in linears:
        before = [name for name in shapes if name != down]
        if any(shapes[name][1] != out_features for name in before):
            continue
        widths = [shapes[name][0] for name in before]
        if len(before) == 2 and widths == [in_features] * 2:
            for gate, up in (before, before[::-1]):
                yield make(gate=gate, up=up, down=down)
        elif len(before) == 1 and widths == [2 * in_features]:
            yield make(gate=before[0], up=None, down=down)
        elif len(before) == 1 and widths == [in_features]:
            yield make(gate=None, up=before[0], down=down)


# What has no place in a forward that only computes.
STATEMENTS = (ast.Global, ast.Nonlocal, ast.Yield, ast.YieldFrom, ast.Await, ast.With, ast.Try, ast.Delete)


@functools.cache
def computes_only(kind: type) -> bool:
    """Whether a class's forward does nothing but compute: it changes no attribute and calls only tensor functions.

    A fused forward would leave out what else it does. A class without source is not judged: False.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))  # type: ignore[attr-defined]
    except (OSError, TypeError, SyntaxError):
        return False
    for node in ast.walk(tree):
        if isinstance(node, STATEMENTS):
            return False
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        if any(isinstance(part, (ast.Attribute, ast.Subscript)) for t in targets for part in ast.walk(t)):
            return False
        if isinstance(node, ast.Call) and not _tensor_call(node.func):
            return False
    return True


def _tensor_call(function: ast.expr) -> bool:
    """self.child(x), torch.f(x), F.f(x), x.f(): not print(x), log.info(x) or super().forward(x)."""
    if isinstance(function, ast.Name):
        return function.id in ("isinstance", "len", "int", "float", "getattr", "hasattr", "tuple", "max", "min")
    if not isinstance(function, ast.Attribute):
        return isinstance(function, ast.Subscript)  # self.children[i](x)
    root: ast.expr = function
    while isinstance(root, (ast.Attribute, ast.Subscript, ast.Call)):
        root = root.func if isinstance(root, ast.Call) else root.value
    if isinstance(root, ast.Name) and root.id in ("super", "logger", "logging", "warnings", "sys", "os", "print"):
        return False
    name = function.attr
    return name not in ("append", "update", "add_", "register_buffer", "copy_", "backward", "extend", "write")


def language_models(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The models of transformers inside ``model`` that have an output projection, outermost first, by name."""
    found = []
    for name, module in model.named_modules():
        if any(
            c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(module).__mro__
        ):
            try:
                head = module.get_output_embeddings()  # type: ignore[operator]
            except (AttributeError, NotImplementedError, TypeError):
                head = None
            if isinstance(head, nn.Module) and isinstance(getattr(head, "weight", None), torch.Tensor):
                found.append((name, module))
    return found
