"""Mistral: Llama with a sliding window that the config holds for all layers."""

from torch import nn

from fastplug.families.row import Family


def window(attention: nn.Module) -> int | None:
    return getattr(attention.config, "sliding_window", None)  # type: ignore[return-value]


MISTRAL = Family("mistral", "transformers.models.mistral.modeling_mistral", "Mistral", sliding_window=window)
