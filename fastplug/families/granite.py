"""Granite: multipliers on the embeddings, on attention's scores, on the residual adds and on the logits."""

from fastplug.families.row import Family

GRANITE = Family(
    "granite",
    "transformers.models.granite.modeling_granite",
    "Granite",
    residual_multiplier="residual_multiplier",
    logit_scale=lambda config: 1.0 / config.logits_scaling,
)
FAMILIES = (GRANITE,)
