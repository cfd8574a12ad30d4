"""Packed rows: several documents in one row, kept apart without a quadratic mask.

Hosts tell documents apart by ``cu_seq_lens_q`` (transformers' FlashAttentionKwargs; TRL's and fastplug's collators give
them) or by positions that start again. transformers makes a mask of the positions, [B, 1, S, S], but only where there
is no cache; given ``cu_seq_lens_q`` it trusts the attention function, and ``sdpa`` does not look at them.

So a hook before the backbone (the module that holds the decoder layers) hands it a
:class:`~fastplug.ops.document_attention.DocumentMask`, which carries the documents to every layer: fused attention runs
within documents, and all else that reads the mask finds the numbers. The hook does nothing where

* the step has a mask of the host's or a cache already,
* the attention is not transformers' own ``sdpa``: FlashAttention 2 takes ``cu_seq_lens_q`` itself,
* only the positions tell, and the host would not have looked at them (it was asked for a cache): nobody's step means
  something else with fastplug than without,
* some layer's attention is neither full nor over a sliding window.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastplug.manager import hookimpl
from fastplug.ops.document_attention import DocumentMask, Documents
from fastplug.patching.sites import KEY

logger = logging.getLogger("fastplug")

CU_SEQLENS, MAX_LENGTH = "cu_seq_lens_q", "max_length_q"


class DocumentsApart:
    """The hook: a forward pre-hook of the backbone, with keywords."""

    def __call__(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.get(CU_SEQLENS)
        if len(args) > 1 or kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
            return None
        config: Any = backbone.config
        cached = kwargs.get("use_cache")
        if given is not None and cached is None:  # whoever tells where documents begin wants them apart
            kwargs = {**kwargs, "use_cache": False}
        elif _caches(backbone, config, cached):
            return None
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if isinstance(tokens, torch.Tensor) and not torch.compiler.is_compiling() and attention_is_stock(config):
            documents = _documents(kwargs, tokens)
            mask = None if documents is None else _mask(backbone, config, documents)
            if mask is not None:
                kwargs = {**kwargs, "attention_mask": mask}
        return args, kwargs

    def __reduce__(self) -> Any:
        # A model saved whole must load where fastplug is not installed; this does nothing.
        return getattr, (contextlib.nullcontext(), "__exit__")

    def __deepcopy__(self, memo: dict[int, Any]) -> DocumentsApart:
        return self


def attention_is_stock(config: Any) -> bool:
    """Whether attention is ``sdpa``, and that is transformers' own function: Axolotl registers another one."""
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    function = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS["sdpa"]
    stock = sys.modules.get("transformers.integrations.sdpa_attention")
    return stock is not None and function is stock.sdpa_attention_forward


def _caches(backbone: nn.Module, config: Any, asked: bool | None) -> bool:
    """Whether transformers makes a cache for this step. Under gradient checkpointing it never does."""
    if backbone.training and getattr(backbone, "gradient_checkpointing", False):
        return False
    return bool(getattr(config, "use_cache", True) if asked is None else asked)


def _documents(kwargs: dict[str, Any], tokens: torch.Tensor) -> Documents | None:
    """The documents of a batch of ``tokens`` [B, S] or embeddings [B, S, H], or None where each row is one."""
    cu_seqlens, positions = kwargs.get(CU_SEQLENS), kwargs.get("position_ids")
    rows, length = tokens.shape[:2]
    if isinstance(cu_seqlens, torch.Tensor) and rows == 1:
        longest = kwargs.get(MAX_LENGTH)
        longest = None if longest is None else int(longest)
        return Documents(cu_seqlens.to(tokens.device, non_blocking=True), rows, length, longest)
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2 or positions.shape[1] != length:
        return None
    return Documents.from_positions(positions.expand(rows, -1))


def _mask(backbone: nn.Module, config: Any, documents: Documents) -> Any:
    """What to give as ``attention_mask``: one mask, one for each kind of layer, or None to leave it to the host."""
    reads = _reads_masks(type(backbone))  # type: ignore[arg-type]
    if reads is None:
        return None
    kinds = set(getattr(config, "layer_types", None) or ())
    if not getattr(config, "is_causal", True) or not kinds <= {"full_attention", "sliding_attention"}:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    if window is None or window >= documents.max_length or kinds == {"full_attention"}:
        return DocumentMask(documents)
    if len(kinds) < 2:  # no kinds: transformers takes the window for all layers, where the config has one
        return DocumentMask(documents, window) if reads != "full" else None
    if reads != "kinds":
        return None
    return {"full_attention": DocumentMask(documents), "sliding_attention": DocumentMask(documents, window)}


@functools.cache
def _reads_masks(backbone: type[nn.Module]) -> str | None:
    """Which masks this class's forward takes as they are: ``"full"``, ``"window"``, one for each of the ``"kinds"`` of
    layers, or None (transformers before 4.53, and backbones that make something else of a mask)."""
    try:
        source = inspect.getsource(inspect.unwrap(backbone.forward))
    except (OSError, TypeError):
        return None
    if "create_causal_mask" not in source:
        return None
    if "isinstance(causal_mask_mapping := attention_mask, dict)" in source:
        return "kinds"
    return "window" if "create_sliding_window_causal_mask" in source else "full"


def backbones(model: nn.Module) -> Iterator[nn.Module]:
    """The modules with a config that hold a list of layers of which one at least is patched."""
    for module in model.modules():
        lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
        if hasattr(module, "config") and any(KEY in part.__dict__ for layers in lists for part in layers.modules()):
            yield module


def _remove(module: nn.Module) -> bool:
    ours = [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, DocumentsApart)]
    for key in ours:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    return bool(ours)


@hookimpl
def fastplug_after_apply(applied: Any) -> None:
    for backbone in backbones(applied.model) if applied.options.attention == "auto" else ():
        _remove(backbone)
        backbone.register_forward_pre_hook(DocumentsApart(), with_kwargs=True)


@hookimpl
def fastplug_after_undo(model: Any, report: Any) -> None:
    for module in model.modules():
        _remove(module)


__all__ = ["DocumentsApart", "attention_is_stock", "backbones"]
