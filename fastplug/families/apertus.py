"""Apertus: q and k normalized by head, an MLP without a gate whose activation has parameters (xIELU)."""

from fastplug.families.row import Family, QKNormRow

APERTUS = Family(
    "apertus",
    "transformers.models.apertus.modeling_apertus",
    "Apertus",
    qk_norm=QKNormRow(),
    gate=None,
    input_norm="attention_layernorm",
    post_norm="feedforward_layernorm",
)
FAMILIES = (APERTUS,)
