"""Families with PyTorch's LayerNorm: StarCoder2, StableLM, GPT-NeoX (Pythia), Nemotron (its weights count from one)."""

from fastplug.families.mistral import config_window
from fastplug.families.row import Family, NormRow, QKNormRow

NORM = NormRow("layer")

STARCODER2 = Family(
    "starcoder2",
    "transformers.models.starcoder2.modeling_starcoder2",
    "Starcoder2",
    class_names={"norm": None},
    norm=NORM,
    attention_arguments={"sliding_window": config_window},
    output_dropout="residual_dropout",
    gate=None,
    up="c_fc",
    down="c_proj",
    activation="act",
)
STABLELM = Family(
    "stablelm",
    "transformers.models.stablelm.modeling_stablelm",
    "StableLm",
    class_names={"norm": None},
    norm=NORM,
    qk_norm=QKNormRow(("q_layernorm", "k_layernorm"), "heads_first"),
    dropouts=(None, "dropout"),
    parallel="use_parallel_residual",
)
GPT_NEOX = Family(
    "gpt_neox",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "GPTNeoX",
    class_names={"norm": None, "decoder_layer": "GPTNeoXLayer"},
    norm=NORM,
    qkv=("query_key_value",),
    qkv_layout="heads",
    out="dense",
    head_dim="head_size",
    attention_name="attention",
    dropouts=("post_attention_dropout", "post_mlp_dropout"),
    parallel="use_parallel_residual",
    gate=None,
    up="dense_h_to_4h",
    down="dense_4h_to_h",
    activation="act",
)
NEMOTRON = Family(
    "nemotron",
    "transformers.models.nemotron.modeling_nemotron",
    "Nemotron",
    class_names={"norm": None},
    norm=NORM,
    gate=None,
)
FAMILIES = (STARCODER2, STABLELM, GPT_NEOX, NEMOTRON)
