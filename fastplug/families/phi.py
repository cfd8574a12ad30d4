"""Phi-3, 3.5 and 4: one projection for q, k and v, one for gate and up, a part of each head rotated."""

from fastplug.families.mistral import config_window
from fastplug.families.row import Family

PHI3 = Family(
    "phi3",
    "transformers.models.phi3.modeling_phi3",
    "Phi3",
    qkv=("qkv_proj",),
    gate="gate_up_proj",
    up=None,
    activation="activation_fn",
    attention_arguments={"sliding_window": config_window},
    dropouts=("resid_attn_dropout", "resid_mlp_dropout"),
)
FAMILIES = (PHI3,)
