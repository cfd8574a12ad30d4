"""Whether a module has what its row names: rows are written for some versions of a library and meet others."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fastplug.families import Family


def misfit(module: nn.Module, family: Family, role: str) -> str | None:
    """Which attribute the row names that the module, or a part it is patched with, does not have; None if it fits."""
    for name in filter(None, _names(module, family, role)):
        if not hasattr(module, name):
            return f"the row {family.name} is of another version: {type(module).__qualname__} has no {name}"
    if role != "decoder_layer":
        return None
    attention, mlp = getattr(module, family.attention_name), getattr(module, family.mlp_of(module))
    parts = [(attention, "attention"), (mlp, "mlp")]
    found = (misfit(part, family, part_role) for part, part_role in parts if family.plays(part, part_role))
    return next(filter(None, found), None)


def _names(module: nn.Module, family: Family, role: str) -> Iterator[str | None]:
    if role == "decoder_layer":
        yield from (family.attention_name, family.mlp_of(module), family.residual_multiplier, *family.dropouts)
        yield from (family.input_norm, family.attention_post_norm, family.post_norm, family.mlp_post_norm)
        yield family.parallel if isinstance(family.parallel, str) else None
    elif role == "attention":
        yield from (*family.qkv, family.out, family.head_dim, family.output_dropout)
        yield from ("config", "scaling", "attention_dropout")  # whatever takes part in transformers' interface has them
        yield from (source for source in family.attention_arguments.values() if isinstance(source, str))
        yield family.rope.when if isinstance(family.rope.when, str) else None
        if family.qk_norm is not None and hasattr(module, family.qk_norm.names[0]):
            yield family.qk_norm.names[1]
    elif role == "mlp":
        yield from (*family.gate_up, family.down, family.activation, family.output_dropout)
    elif role == "linear":
        yield from (name for names in family.shared for name in names)
