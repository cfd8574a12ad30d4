"""Mistral: Llama with a sliding window that the config holds for all layers. Ministral, CWM: a window by layer."""

from torch import nn

from fastplug.families.row import Family


def config_window(attention: nn.Module) -> int | None:
    return getattr(attention.config, "sliding_window", None)  # type: ignore[return-value]


MISTRAL = Family(
    "mistral",
    "transformers.models.mistral.modeling_mistral",
    "Mistral",
    attention_arguments={"sliding_window": config_window},
)
MINISTRAL = Family(
    "ministral",
    "transformers.models.ministral.modeling_ministral",
    "Ministral",
    attention_arguments={"sliding_window": "sliding_window"},
)
CWM = Family(
    "cwm",
    "transformers.models.cwm.modeling_cwm",
    "Cwm",
    attention_arguments={"sliding_window": "sliding_window"},
)
MIXTRAL = Family(
    "mixtral",
    "transformers.models.mixtral.modeling_mixtral",
    "Mixtral",
    class_names={"mlp": None},
    attention_arguments={"sliding_window": config_window},
    old_mlp_name="block_sparse_moe",
    mixture=True,
    trace_loss=True,
)
FAMILIES = (MISTRAL, MINISTRAL, CWM, MIXTRAL)
