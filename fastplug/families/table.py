"""What is fused per family, as a table: ``fastplug doctor --families`` and docs/families.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from fastplug.families.row import Family


@dataclass(frozen=True)
class Line:
    """One family: how each role is served, empty where it is not, and what sets the family apart from Llama."""

    family: str
    models: str
    layer: str
    attention: str
    mlp: str
    norm: str
    loss: str
    differs: str


HEADINGS = ("family", "models", "layer", "attention", "MLP", "norm", "head and loss", "differs from Llama in")


def lines(families: Sequence[Family]) -> list[Line]:
    """The table, in the order of the rows."""
    return [_line(family) for family in families]


def _line(family: Family) -> Line:
    roles = set(family.classes.values())
    models = [name for name, role in family.classes.items() if role == "lm_head_loss"]
    layer = "one stream" if family.llama_layer else "by row"
    mlp = "plain" if family.gate is None else "gated"
    norm = {"rms": "RMSNorm", "layer": "LayerNorm"}[family.norm.kind]
    return Line(
        family.name,
        ", ".join(models) or "a part of others",
        layer if "decoder_layer" in roles else "",
        "q, k, v, RoPE, output" if "attention" in roles else "",
        f"{mlp}, experts as they are" if family.mixture and "mlp" in roles else mlp if "mlp" in roles else "",
        norm if "norm" in roles else "PyTorch's" if family.norm.kind == "layer" and "decoder_layer" in roles else "",
        ("traced" if family.trace_loss else "fused") if "lm_head_loss" in roles else "",
        "; ".join(differences(family)) or "nothing",
    )


def differences(family: Family) -> list[str]:
    """What the row says beyond names, in words."""
    roles = set(family.classes.values())
    found = []
    norm, rope = family.norm, family.rope
    if norm.offset:
        found.append(f"norm weights count from {norm.offset:g}")
    if not norm.cast_first and norm.kind == "rms":
        found.append("norm weight before the cast")
    if norm.kind == "layer":
        found.append("LayerNorm")
    if "attention" not in roles:
        found.append("attention runs as it is")
    if "attention" in roles:
        if len(family.qkv) == 1:
            found.append("one projection for q, k and v" + (", by head" if family.qkv_layout == "heads" else ""))
        if family.qk_norm is not None:
            whole = family.qk_norm.shape == "flat"
            found.append("q and k normalized" + (" as a whole" if whole else " by head"))
        if rope.layout == "interleaved":
            found.append("RoPE on neighbouring channels")
        if rope.table == "narrow":
            found.append("half-width RoPE tables")
        if rope.when is not None:
            found.append("layers without RoPE")
        if family.query_scale is not None:
            found.append("queries scaled by position")
        words = {"sliding_window": "sliding window", "softcap": "softcap on scores", "s_aux": "attention sinks"}
        found.extend(words.get(name, name) for name in family.attention_arguments)
    if "mlp" in roles and family.gate is not None and family.up is None:
        found.append("one projection for gate and up")
    if "mlp" in roles and family.gate is None:
        found.append("MLP without a gate")
    if "decoder_layer" in roles:
        norms = (family.input_norm, family.attention_post_norm, family.post_norm, family.mlp_post_norm)
        if norms[0] is None and norms[1] is not None:
            found.append("norms after attention and MLP")
        elif norms[1] is not None:
            found.append("norms before and after attention and MLP")
        if family.parallel:
            found.append("attention and MLP side by side" + ("" if family.parallel is True else " if configured"))
        if family.residual_multiplier is not None:
            found.append("factor on residual adds")
        if any(family.dropouts) or family.output_dropout:
            found.append("dropout on residual adds")
    if family.mixture:
        found.append("mixture of experts")
    if family.logit_softcap is not _default("logit_softcap"):
        found.append("softcap on logits")
    if family.logit_scale is not _default("logit_scale"):
        found.append("factor on logits")
    return found


def _default(name: str) -> object:
    return next(field.default for field in fields(Family) if field.name == name)


def markdown(families: Sequence[Family]) -> str:
    """The table in Markdown."""
    rows = [HEADINGS, tuple("---" for _ in HEADINGS)]
    rows.extend(tuple(vars(line).values()) for line in lines(families))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
