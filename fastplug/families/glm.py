"""GLM-4: neighbouring channels rotated, on half of each head; gate and up in one projection; four norms a layer.

GLM (the 9B of 2024) is the same without the norms on the outputs. GLM-4.5 (glm4_moe) is a mixture of another kind:
halves rotated, norms on q and k where the config asks for them.
"""

from fastplug.families.row import Family, QKNormRow, RopeRow

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
GLM4_MOE = Family(
    "glm4_moe",
    "transformers.models.glm4_moe.modeling_glm4_moe",
    "Glm4Moe",
    qk_norm=QKNormRow(),
    mixture=True,
    trace_loss=True,
)
FAMILIES = (GLM, GLM4, GLM4_MOE)
