"""Mixtures of experts: everything around the experts is patched, they and their router run as they are."""

from fastplug.families.qwen2 import window
from fastplug.families.row import Family, NormRow, QKNormRow, RopeRow

QWEN2_MOE = Family(
    "qwen2_moe",
    "transformers.models.qwen2_moe.modeling_qwen2_moe",
    "Qwen2Moe",
    attention_arguments={"sliding_window": window},
    mixture=True,
    trace_loss=True,
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "Qwen3Moe",
    attention_arguments={"sliding_window": window},
    qk_norm=QKNormRow(),
    mixture=True,
    trace_loss=True,
)
GPT_OSS = Family(
    "gpt_oss",
    "transformers.models.gpt_oss.modeling_gpt_oss",
    "GptOss",
    class_names={"mlp": None},
    norm=NormRow(cast_first=False),
    rope=RopeRow(table="narrow"),
    attention_arguments={"sliding_window": "sliding_window", "s_aux": "sinks"},
    mixture=True,
    trace_loss=True,
)
OLMOE = Family(
    "olmoe",
    "transformers.models.olmoe.modeling_olmoe",
    "Olmoe",
    class_names={"mlp": None},
    qk_norm=QKNormRow(shape="flat"),
    mixture=True,
    trace_loss=True,
)
DOTS1 = Family(
    "dots1",
    "transformers.models.dots1.modeling_dots1",
    "Dots1",
    attention_arguments={"sliding_window": "sliding_window"},
    qk_norm=QKNormRow(),
    mixture=True,
    trace_loss=True,
)
MINIMAX_M2 = Family(
    "minimax_m2",
    "transformers.models.minimax_m2.modeling_minimax_m2",
    "MiniMaxM2",
    class_names={"mlp": None},
    qk_norm=QKNormRow(shape="flat"),
    mixture=True,
    trace_loss=True,
)
FAMILIES = (QWEN2_MOE, QWEN3_MOE, GPT_OSS, OLMOE, DOTS1, MINIMAX_M2)
