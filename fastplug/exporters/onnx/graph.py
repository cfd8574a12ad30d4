"""A causal language model as a function of tensors alone, in the names that ONNX generation code uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastplug.patching.caches import name_in

Past = list[tuple[Tensor, Tensor]]


class Decoder(nn.Module):
    """``model`` with its cache as plain inputs and outputs.

    Args:
        model: A causal language model.
        kv_cache: Whether the cache goes in and out.
    """

    def __init__(self, model: Any, kv_cache: bool) -> None:
        super().__init__()
        self.model = model
        self.kv_cache = kv_cache
        self.cache = name_in(type(model).forward)
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        self.layers = int(config.num_hidden_layers)
        self.vocabulary = int(config.vocab_size)
        heads = int(config.num_attention_heads)
        self.heads = int(getattr(config, "num_key_value_heads", None) or heads)
        self.width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past | None = None
    ) -> tuple[Tensor, ...]:
        """Args: int64 ``[batch, sequence]``, ``[batch, past + sequence]``, ``[batch, sequence]``, and per layer key
        and value ``[batch, heads, past, width]``. Returns logits ``[batch, sequence, vocabulary]`` and the cache."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        if past is None:
            return (self.model(**inputs, use_cache=False).logits,)
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        output = self.model(**inputs, use_cache=True, **{self.cache: cache})
        grown = getattr(output, self.cache)
        if hasattr(grown, "layers"):
            pairs = [(layer.keys, layer.values) for layer in grown.layers]
        else:  # transformers before 4.56
            pairs = list(zip(grown.key_cache, grown.value_cache))
        return (output.logits, *(tensor for pair in pairs for tensor in pair))

    def example(self) -> tuple[Any, ...]:
        """Inputs to trace with; no size is 0 or 1, which a trace would take for constants."""
        batch, sequence, past = 2, 5, 7 if self.kv_cache else 0
        ids = torch.arange(batch * sequence).view(batch, sequence) % self.vocabulary
        mask = torch.ones(batch, past + sequence, dtype=torch.int64)
        positions = torch.arange(past, past + sequence).expand(batch, sequence).contiguous()
        if not self.kv_cache:
            return ids, mask, positions
        shape = (batch, self.heads, past, self.width)
        return ids, mask, positions, [(torch.zeros(shape), torch.zeros(shape)) for _ in range(self.layers)]

    def dynamic_shapes(self) -> tuple[Any, ...]:
        total = "past_and_sequence" if self.kv_cache else "sequence"
        plain = ({0: "batch", 1: "sequence"}, {0: "batch", 1: total}, {0: "batch", 1: "sequence"})
        if not self.kv_cache:
            return (*plain, None)[:3]
        return (*plain, [({0: "batch", 2: "past"}, {0: "batch", 2: "past"}) for _ in range(self.layers)])

    def input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "position_ids", *self._cache_names("past_key_values")]

    def output_names(self) -> list[str]:
        return ["logits", *self._cache_names("present")]

    def _cache_names(self, prefix: str) -> list[str]:
        layers = range(self.layers) if self.kv_cache else ()
        return [f"{prefix}.{layer}.{part}" for layer in layers for part in ("key", "value")]
