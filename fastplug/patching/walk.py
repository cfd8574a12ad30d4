"""Find the sites of a model: the modules whose exact class a family row names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from fastplug.families import Family
from fastplug.patching.sites import Site
from fastplug.sharding import own_class


def walk(model: nn.Module, families: Sequence[Family]) -> Iterator[Site]:
    """Sites in the order of ``model.named_modules()``: a decoder layer comes before its parts.

    A class matches by the module that defines it and its name, so patched instances, whose classes keep both, match
    too; subclasses that users wrote do not.
    """
    known: dict[tuple[str, str], tuple[str, Family]] = {}
    for family in families:
        for class_name, role in family.classes.items():
            known[family.module, class_name] = (role, family)
    for name, module in model.named_modules():
        kind = own_class(type(module))
        found = known.get((kind.__module__, kind.__qualname__))
        if found is not None:
            yield Site(found[0], name, module, found[1])
