"""Sites of models, or parts of models, that no row describes: guessed by structure, kept after a check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from fastplug.families import Family, structural
from fastplug.patching.bind import MARK
from fastplug.patching.checking import check
from fastplug.patching.inspection import replaced_forward
from fastplug.patching.report import LEFT, PATCHED
from fastplug.patching.sites import KEY, Binding, Choice, Implementation, Runtime, Site

EXPERTS = ("expert", "router")  # mixtures of experts run as they are


def sites_by_structure(
    model: nn.Module, known: Sequence[Site], implementations: Sequence[Implementation], runtime: Runtime
) -> Iterator[tuple[Site, list[Choice]]]:
    """Sites of the language models in ``model`` beside the ``known`` ones, each with what its best guess came to."""
    taken = {id(site.module) for site in known}
    verdicts: dict[object, Family | str] = {}
    models = structural.language_models(model)
    if not models:
        return
    name, outermost = models[0]
    roles = [(name, outermost, "lm_head_loss")] if not any(s.role == "lm_head_loss" for s in known) else []
    for part, module in outermost.named_modules(prefix=name):
        if id(module) in taken or any(word in part for word in EXPERTS):
            continue
        role = structural.role_of(module)
        if role is not None:
            roles.append((part, module, role))
    for part, module, role in roles:
        bound: Binding | None = module.__dict__.get(KEY)
        key = _key(module, role)
        if bound is not None:
            verdicts[key] = bound.family
        yield _decided(part, module, role, key, verdicts, implementations, runtime)


def _decided(
    name: str,
    module: nn.Module,
    role: str,
    key: object,
    verdicts: dict[object, Family | str],
    implementations: Sequence[Implementation],
    runtime: Runtime,
) -> tuple[Site, list[Choice]]:
    candidates = [candidate for candidate in implementations if candidate.role == role]
    if role in runtime.options.disable:
        return _left(name, module, role, candidates[0], "disabled by the options")
    reason = replaced_forward(module)
    if reason is not None:
        return _left(name, module, role, candidates[0], reason)
    verdict = verdicts.get(key)
    tried = [verdict] if isinstance(verdict, Family) else list(structural.guesses(module, role))
    reason = verdict if isinstance(verdict, str) else "its structure is not one that fastplug knows"
    if isinstance(verdict, str):
        tried = []
    for family in tried:
        site = Site(role, name, module, family)
        for candidate in candidates:
            found = candidate.refuse(site, runtime)
            if found is not None:
                reason = found
                continue
            if verdict is None:
                found = check(site, candidate, runtime)
            if found is None:
                verdicts[key] = family
                left = candidate.left_alone(site, runtime)
                return site, [Choice(candidate, PATCHED) if left is None else Choice(candidate, LEFT, left)]
            reason = found
    if verdict is None:
        verdicts[key] = reason
    return _left(name, module, role, candidates[0], reason)


def _left(name: str, module: nn.Module, role: str, candidate: Implementation, reason: str) -> tuple[Site, list[Choice]]:
    family = structural.row(type(module), role)
    return Site(role, name, module, family), [Choice(candidate, LEFT, f"no row describes it; {reason}")]


def _key(module: nn.Module, role: str) -> object:
    """What modules of one structure have in common: what holds for one of them holds for all."""
    kind = type(module)
    parts = tuple((name, vars(type(child)).get(MARK, type(child))) for name, child in module.named_modules())
    shapes = tuple((name, tuple(parameter.shape), parameter.dtype) for name, parameter in module.named_parameters())
    numbers = tuple((k, v) for k, v in vars(module).items() if isinstance(v, (int, float, str)) and k != "training")
    return role, vars(kind).get(MARK, kind), parts, shapes, numbers
