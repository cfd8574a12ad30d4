"""SmolLM3: every fourth layer without RoPE. (SmolLM and SmolLM2 are Llamas.)"""

from fastplug.families.row import Family, RopeRow

SMOLLM3 = Family(
    "smollm3",
    "transformers.models.smollm3.modeling_smollm3",
    "SmolLM3",
    rope=RopeRow(when="use_rope"),
    attention_arguments={"sliding_window": "sliding_window"},
)
FAMILIES = (SMOLLM3,)
