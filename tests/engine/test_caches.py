"""A cache of keys and values is handed on under whatever name the installed transformers has for it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from fastplug.patching import caches
from tests import models
from tests.engine.step import fallbacks, patched


def test_filled_and_read_like_the_unpatched_models() -> None:
    model = models.qlora().eval()
    twin = patched(model)
    ids = models.batch()["input_ids"]
    name = caches.name_in(type(model.get_base_model()).forward)
    for part in (model, twin):
        whole = part(ids, use_cache=False).logits
        cache: Any = DynamicCache()
        part(ids[:, :9], use_cache=True, **{name: cache})
        assert cache.get_seq_length() == 9
        rest = part(ids[:, 9:], use_cache=True, **{name: cache})
        torch.testing.assert_close(rest.logits, whole[:, 9:], rtol=1e-4, atol=1e-5)
        assert getattr(rest, name) is cache
    assert not fallbacks(twin), fallbacks(twin)


def test_unknown_name_is_left_to_the_model() -> None:
    """What a later version might do: the cache must not be lost in silence."""
    model = patched(models.qlora())
    decoder: Any = model.get_base_model().model
    x = torch.randn(1, 5, model.config.hidden_size)
    positions = decoder.rotary_emb(x, torch.arange(5)[None])
    layer = decoder.layers[0]
    layer.self_attn(x, position_embeddings=positions, attention_mask=None, kv_store=DynamicCache())
    assert "a cache is given as 'kv_store', a name that is not known here" in fallbacks(model)


def test_names() -> None:
    cache = DynamicCache()
    assert caches.given({"past_key_value": None, "layer_past": cache}) is cache
    assert caches.given({"hidden_states": cache}) is None
    arguments: dict[str, Any] = {"cache": cache, "past_key_values": None, "use_cache": True}
    assert caches.take(arguments) is cache
    assert arguments == {"use_cache": True}
