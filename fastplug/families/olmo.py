"""OLMo 2 and 3: norms on the outputs of attention and MLP instead of their inputs, q and k normalized as a whole."""

from fastplug.families.row import Family, NormRow, QKNormRow

OLMO2 = Family(
    "olmo2",
    "transformers.models.olmo2.modeling_olmo2",
    "Olmo2",
    norm=NormRow(cast_first=False),
    qk_norm=QKNormRow(shape="flat"),
    input_norm=None,
    attention_post_norm="post_attention_layernorm",
    post_norm=None,
    mlp_post_norm="post_feedforward_layernorm",
)
OLMO3 = Family(
    "olmo3",
    "transformers.models.olmo3.modeling_olmo3",
    "Olmo3",
    norm=NormRow(cast_first=False),
    qk_norm=QKNormRow(shape="flat"),
    attention_arguments={"sliding_window": "sliding_window"},
    input_norm=None,
    attention_post_norm="post_attention_layernorm",
    post_norm=None,
    mlp_post_norm="post_feedforward_layernorm",
)
FAMILIES = (OLMO2, OLMO3)
