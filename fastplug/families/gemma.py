"""Gemma 1, 2 and 3 (text): the norm's weight is an offset from one, applied before the cast; GELU.

Gemma 2 and 3 have four norms a layer.
"""

from fastplug.families.row import Family, NormRow, QKNormRow

GEMMA_NORM = NormRow(offset=1.0, cast_first=False, eps="eps")

GEMMA = Family("gemma", "transformers.models.gemma.modeling_gemma", "Gemma", norm=GEMMA_NORM)
GEMMA2 = Family(
    "gemma2",
    "transformers.models.gemma2.modeling_gemma2",
    "Gemma2",
    norm=GEMMA_NORM,
    attention_arguments={"sliding_window": "sliding_window", "softcap": "attn_logit_softcapping"},
    attention_post_norm="post_attention_layernorm",
    post_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    logit_softcap=lambda config: config.final_logit_softcapping,
)
GEMMA3 = Family(
    "gemma3",
    "transformers.models.gemma3.modeling_gemma3",
    "Gemma3",
    norm=GEMMA_NORM,
    qk_norm=QKNormRow(),
    attention_arguments={"sliding_window": "sliding_window"},
    attention_post_norm="post_attention_layernorm",
    post_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    rope_of_layer=("position_embeddings_local", "position_embeddings_global", "is_sliding"),
    class_names={"lm_head_loss": ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")},
    trace_loss=True,
)
FAMILIES = (GEMMA, GEMMA2, GEMMA3)
