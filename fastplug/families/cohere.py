"""Cohere (Command R) and Cohere2: LayerNorm without bias, attention and MLP side by side.

Neighbouring channels are rotated. Cohere2 rotates only in layers with a window.
"""

from fastplug.families.row import Family, NormRow, QKNormRow, RopeRow

NORM = NormRow("layer", cast_first=False)

COHERE = Family(
    "cohere",
    "transformers.models.cohere.modeling_cohere",
    "Cohere",
    class_names={"norm": "CohereLayerNorm"},
    norm=NORM,
    qk_norm=QKNormRow(),
    rope=RopeRow("interleaved", "repeated"),
    post_norm=None,
    parallel=True,
    logit_scale=lambda config: config.logit_scale,
)
COHERE2 = Family(
    "cohere2",
    "transformers.models.cohere2.modeling_cohere2",
    "Cohere2",
    class_names={"norm": "Cohere2LayerNorm"},
    norm=NORM,
    rope=RopeRow("interleaved", "repeated", when="sliding_window"),
    attention_arguments={"sliding_window": "sliding_window"},
    post_norm=None,
    parallel=True,
    logit_scale=lambda config: config.logit_scale,
)
FAMILIES = (COHERE, COHERE2)
