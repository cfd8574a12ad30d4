"""GLM-4: neighbouring channels rotated, on half of each head; gate and up in one projection; four norms a layer.

GLM (the 9B of 2024) is the same without the norms on the outputs.
"""

from fastplug.families.row import Family, RopeRow

GLM = Family(
    "glm",
    "transformers.models.glm.modeling_glm",
    "Glm",
    rope=RopeRow(layout="interleaved"),
    gate="gate_up_proj",
    up=None,
    activation="activation_fn",
)
GLM4 = Family(
    "glm4",
    "transformers.models.glm4.modeling_glm4",
    "Glm4",
    rope=RopeRow(layout="interleaved"),
    gate="gate_up_proj",
    up=None,
    activation="activation_fn",
    attention_post_norm="post_self_attn_layernorm",
    mlp_post_norm="post_mlp_layernorm",
)
FAMILIES = (GLM, GLM4)
