"""Families whose attention does something of its own: their MLPs, norms, head and loss are patched, site by site.

Gemma 4 shares keys and values between layers, Llama 4 turns complex numbers and scales queries by position, Falcon and
GPT-2 predate the attention interface.
"""

from __future__ import annotations

from typing import Any

from fastplug.families.row import Family, NormRow

WITHOUT_LAYERS: dict[str, Any] = {"decoder_layer": None, "attention": None}

GEMMA4 = Family(
    "gemma4",
    "transformers.models.gemma4.modeling_gemma4",
    "Gemma4",
    class_names={
        **WITHOUT_LAYERS,
        "mlp": "Gemma4TextMLP",
        "norm": "Gemma4RMSNorm",
        "lm_head_loss": ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
    },
    norm=NormRow(cast_first=False, eps="eps"),
    trace_loss=True,
)
LLAMA4 = Family(
    "llama4",
    "transformers.models.llama4.modeling_llama4",
    "Llama4Text",
    class_names={**WITHOUT_LAYERS, "lm_head_loss": ("Llama4ForCausalLM", "Llama4ForConditionalGeneration")},
    norm=NormRow(eps="eps"),
    activation="activation_fn",
    trace_loss=True,
)
FALCON = Family(
    "falcon",
    "transformers.models.falcon.modeling_falcon",
    "Falcon",
    class_names={**WITHOUT_LAYERS, "norm": None},
    gate=None,
    up="dense_h_to_4h",
    down="dense_4h_to_h",
    activation="act",
    trace_loss=True,
)
GPT2 = Family(
    "gpt2",
    "transformers.models.gpt2.modeling_gpt2",
    "GPT2",
    class_names={**WITHOUT_LAYERS, "mlp": None, "norm": None, "lm_head_loss": "GPT2LMHeadModel"},
    trace_loss=True,
)
FAMILIES = (GEMMA4, LLAMA4, FALCON, GPT2)
