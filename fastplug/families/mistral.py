"""Mistral: Llama with a sliding window that the config holds for all layers. Ministral, CWM: a window by layer.

Ministral 3 also scales its queries by position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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


def position_scale(attention: nn.Module, arguments: Mapping[str, Any]) -> torch.Tensor:
    """Ministral 3's factor on queries beyond the length it was trained on: 1 + beta log(1 + floor(position / length)).

    Source: Nakanishi, "Scalable-Softmax Is Superior for Attention" (2501.19399), as Llama 4 uses it.
    """
    rope: Any = attention.config.rope_parameters  # type: ignore[union-attr]
    positions: torch.Tensor = arguments["position_ids"]
    periods = torch.floor(positions / rope["original_max_position_embeddings"])
    return (1 + rope["llama_4_scaling_beta"] * torch.log(1 + periods))[:, None, :, None]


MINISTRAL3 = Family(
    "ministral3",
    "transformers.models.ministral3.modeling_ministral3",
    "Ministral3",
    attention_arguments={"sliding_window": config_window},
    query_scale=position_scale,
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
FAMILIES = (MISTRAL, MINISTRAL, MINISTRAL3, CWM, MIXTRAL)
