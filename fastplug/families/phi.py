"""Phi-3, 3.5 and 4: one projection for q, k and v, one for gate and up, a part of each head rotated.

Phi-3.5-MoE: separate projections, LayerNorm.
"""

from fastplug.families.mistral import config_window
from fastplug.families.row import Family, NormRow

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
PHIMOE = Family(
    "phimoe",
    "transformers.models.phimoe.modeling_phimoe",
    "Phimoe",
    class_names={"mlp": None, "norm": None},
    norm=NormRow("layer"),
    old_mlp_name="block_sparse_moe",
    mixture=True,
    trace_loss=True,
)
FAMILIES = (PHI3, PHIMOE)
