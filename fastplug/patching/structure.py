"""Sites of models, or parts of models, that no row describes: guessed by structure, kept after a check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from fastplug.families import Family, structural
from fastplug.patching.bind import MARK
from fastplug.patching.checking import check
from fastplug.patching.inspection import replaced_forward
from fastplug.patching.report import LEFT, PATCHED
from fastplug.patching.samples import Samples
from fastplug.patching.sites import KEY, Binding, Choice, Implementation, Runtime, Site

VARYING = ("training", "layer_idx")  # attributes that differ between modules of one structure
EXPERTS = ("expert", "router")  # of a mixture: they run as they are


def sites_by_structure(
    model: nn.Module, known: Sequence[Site], implementations: Sequence[Implementation], runtime: Runtime
) -> Iterator[tuple[Site, list[Choice]]]:
    """Sites of the language models in ``model`` beside the ``known`` ones, each with what its best guess came to."""
    taken = {id(site.module) for site in known}
    models = structural.language_models(model)
    if not models:
        return
    name, outermost = models[0]
    search = _Search(implementations, runtime, Samples(outermost))
    if not any(s.role == "lm_head_loss" for s in known):
        yield search.decided(name, outermost, ("lm_head_loss",))
    for part, module in outermost.named_modules(prefix=name):
        if id(module) in taken or any(word.startswith(EXPERTS) for word in part.split(".")):
            continue
        roles = structural.roles_of(module)
        if roles:
            yield search.decided(part, module, roles)


@dataclass
class _Search:
    """One pass over a model. Modules of one structure share a verdict: the row that describes them, or a reason."""

    implementations: Sequence[Implementation]
    runtime: Runtime
    samples: Samples
    verdicts: dict[object, Family | str] = field(default_factory=dict)

    def decided(self, name: str, module: nn.Module, roles: Sequence[str]) -> tuple[Site, list[Choice]]:
        """The first of the roles that the module can play; where it can play none, why it cannot play the first."""
        bound: Binding | None = module.__dict__.get(KEY)
        answers = []
        for role in roles:
            key = _key(module, role)
            if bound is not None and role in bound.family.classes.values():
                self.verdicts[key] = bound.family
            answers.append(self._decided(name, module, role, key))
            if answers[-1][1][0].status == PATCHED or role in self.runtime.options.disable:
                return answers[-1]
        return answers[0]

    def _decided(self, name: str, module: nn.Module, role: str, key: object) -> tuple[Site, list[Choice]]:
        candidates = [each for each in self.implementations if each.role == role and each.concerns(module)]
        if role in self.runtime.options.disable:
            return _left(name, module, role, candidates[0], "disabled by the options")
        reason = replaced_forward(module)
        if reason is not None:
            return _left(name, module, role, candidates[0], reason)
        verdict = self.verdicts.get(key)
        tried = [verdict] if isinstance(verdict, Family) else list(structural.guesses(module, role))
        reason = verdict if isinstance(verdict, str) else "its structure is not one that fastplug knows"
        if isinstance(verdict, str):
            tried = []
        for family in tried:
            site = Site(role, name, module, family)
            for candidate in candidates:
                found = candidate.refuse(site, self.runtime)
                if found is not None:
                    reason = found
                    continue
                if verdict is None:
                    found = check(site, candidate, self.runtime, self.samples)
                if found is None:
                    self.verdicts[key] = family
                    left = candidate.left_alone(site, self.runtime)
                    return site, [Choice(candidate, PATCHED) if left is None else Choice(candidate, LEFT, left)]
                reason = found
        if verdict is None:
            self.verdicts[key] = reason
        return _left(name, module, role, candidates[0], reason)


def _left(name: str, module: nn.Module, role: str, candidate: Implementation, reason: str) -> tuple[Site, list[Choice]]:
    family = structural.row(type(module), role)
    return Site(role, name, module, family), [Choice(candidate, LEFT, f"no row describes it; {reason}")]


def _key(module: nn.Module, role: str) -> object:
    """What modules of one structure have in common: what holds for one of them holds for all."""
    kind = type(module)
    parts = tuple((name, vars(type(child)).get(MARK, type(child))) for name, child in module.named_modules())
    shapes = tuple((name, tuple(parameter.shape), parameter.dtype) for name, parameter in module.named_parameters())
    numbers = tuple((k, v) for k, v in vars(module).items() if isinstance(v, (int, float, str)) and k not in VARYING)
    return role, vars(kind).get(MARK, kind), parts, shapes, numbers
