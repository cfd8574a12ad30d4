"""Models that also see: their text towers, and of their vision encoders what the ops fit.

The text towers of Llava, Pixtral and Mistral 3 are Llamas, Mistrals or Qwens with rows of their own; only head and loss
stand here. So it is with Gemma 3, whose row names both of its models.
"""

from __future__ import annotations

from typing import Any

from fastplug.families.row import Family, QKNormRow

ONLY_LOSS: dict[str, Any] = {"decoder_layer": None, "attention": None, "mlp": None, "norm": None}
ONLY_PARTS: dict[str, Any] = {"decoder_layer": None, "attention": None, "lm_head_loss": None}

QWEN2_5_VL = Family(
    "qwen2_5_vl",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "Qwen2_5_VL",
    class_names={"mlp": ("Qwen2MLP", "Qwen2_5_VLMLP"), "lm_head_loss": "Qwen2_5_VLForConditionalGeneration"},
    attention_arguments={"sliding_window": "sliding_window"},
    trace_loss=True,
)
QWEN3_VL = Family(
    "qwen3_vl",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "Qwen3VLText",
    class_names={"lm_head_loss": "Qwen3VLForConditionalGeneration"},
    qk_norm=QKNormRow(),
    trace_loss=True,
)
LLAVA = Family(
    "llava",
    "transformers.models.llava.modeling_llava",
    "Llava",
    class_names={**ONLY_LOSS, "lm_head_loss": "LlavaForConditionalGeneration"},
    trace_loss=True,
)
MISTRAL3 = Family(
    "mistral3",
    "transformers.models.mistral3.modeling_mistral3",
    "Mistral3",
    class_names={**ONLY_LOSS, "norm": "Mistral3RMSNorm", "lm_head_loss": "Mistral3ForConditionalGeneration"},
    trace_loss=True,
)
PIXTRAL = Family(
    "pixtral",
    "transformers.models.pixtral.modeling_pixtral",
    "Pixtral",
    class_names=ONLY_PARTS,
)
FAMILIES = (QWEN2_5_VL, QWEN3_VL, LLAVA, MISTRAL3, PIXTRAL)
