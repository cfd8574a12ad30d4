"""Granite: multipliers on the embeddings, on attention's scores, on the residual adds and on the logits."""

from fastplug.families.row import Family

GRANITE = Family(
    "granite",
    "transformers.models.granite.modeling_granite",
    "Granite",
    residual_multiplier="residual_multiplier",
    logit_scale=lambda config: 1.0 / config.logits_scaling,
)
GRANITE_MOE = Family(
    "granitemoe",
    "transformers.models.granitemoe.modeling_granitemoe",
    "GraniteMoe",
    class_names={"mlp": None},
    residual_multiplier="residual_multiplier",
    mlp_name="block_sparse_moe",
    logit_scale=lambda config: 1.0 / config.logits_scaling,
    mixture=True,
    trace_loss=True,
)
FAMILIES = (GRANITE, GRANITE_MOE)
