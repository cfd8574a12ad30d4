"""Packed rows: several documents in one row, kept apart without a quadratic mask.

Hosts tell documents apart by ``cu_seq_lens_q`` (transformers' FlashAttentionKwargs; TRL's and fastplug's collators give
them) or by positions that start again. transformers makes a mask of the positions, [B, 1, S, S], but only where there
is no cache; given ``cu_seq_lens_q`` it trusts the attention function, and ``sdpa`` does not look at them.

So a hook before the backbone (the module that holds the decoder layers) hands it a
:class:`~fastplug.ops.document_attention.DocumentMask`, which carries the documents to every layer: fused attention runs
within documents, and all else that reads the mask finds the numbers. The hook does nothing where

* the step has a mask of the host's or a cache already,
* the attention is not transformers' own ``sdpa``: FlashAttention 2 takes ``cu_seq_lens_q`` itself,
* only the positions tell, and the host would not have looked at them (it was asked for a cache, or never does): a step
  means the same with fastplug and without,
* some layer's attention is neither full nor over a sliding window.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import logging
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastplug.manager import hookimpl
from fastplug.ops.document_attention import DocumentMask, Documents
from fastplug.patching import caches
from fastplug.patching.sites import KEY

logger = logging.getLogger("fastplug")

CU_SEQLENS, MAX_LENGTH = "cu_seq_lens_q", "max_length_q"
_warned: set[Any] = set()


class DocumentsApart:
    """The hook: a forward pre-hook of the backbone, with keywords."""

    def __call__(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.get(CU_SEQLENS)
        if len(args) > 1 or kwargs.get("attention_mask") is not None or caches.given(kwargs) is not None:
            return None
        config: Any = backbone.config
        cached = kwargs.get("use_cache")
        if given is not None and cached is None:  # whoever tells where documents begin wants them apart
            kwargs = {**kwargs, "use_cache": False}
        elif _caches(backbone, config, cached):
            return None
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if isinstance(tokens, torch.Tensor) and not torch.compiler.is_compiling():
            reads = _reads_masks(type(backbone))  # type: ignore[arg-type]
            mask = None
            if reads.given and attention_is_stock(config) and (given is not None or reads.positions):
                documents = _documents(kwargs, tokens)
                mask = None if documents is None else _mask(config, reads, documents)
            if mask is not None:
                kwargs = {**kwargs, "attention_mask": mask}
            elif given is not None and not reads.positions:
                warn_of_crossing(type(backbone), config)
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


def warn_of_crossing(backbone: type, config: Any) -> None:
    """Say once that nobody keeps documents apart."""
    attention = getattr(config, "_attn_implementation", None)
    if attention in ("sdpa", "eager") and (backbone, attention) not in _warned:
        _warned.add((backbone, attention))
        logger.warning(
            "fastplug: with attention %r, %s does not tell packed documents apart, so they see each other; use "
            "attn_implementation='flash_attention_2', or batches with padding",
            attention,
            backbone.__name__,
        )


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


def _mask(config: Any, reads: _Masks, documents: Documents) -> Any:
    """What to give as ``attention_mask``: one mask, one for each kind of layer, or None to leave it to the host."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if not getattr(config, "is_causal", True) or not kinds <= {"full_attention", "sliding_attention"}:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    if reads.old:  # windows are put on the mask by layers, each family in its way
        windowless = window is None or getattr(config, "use_sliding_window", True) is False
        return DocumentMask(documents) if windowless else None
    if window is None or window >= documents.max_length or kinds == {"full_attention"}:
        return DocumentMask(documents)
    if len(kinds) < 2:  # no kinds: transformers takes the window for all layers, where the config has one
        return DocumentMask(documents, window) if reads.window else None
    if not reads.kinds:
        return None
    return {"full_attention": DocumentMask(documents), "sliding_attention": DocumentMask(documents, window)}


@dataclass(frozen=True)
class _Masks:
    """What a backbone's forward does with masks: whether layers get the one it is given, it looks for documents in the
    positions, knows windows, takes a mask for each kind of layer, and makes masks as transformers did before 4.53."""

    given: bool
    positions: bool
    window: bool = False
    kinds: bool = False
    old: bool = False


@functools.cache
def _reads_masks(backbone: type[nn.Module]) -> _Masks:
    """Read off the source of the class's forward.

    Layers do not get the mask that is given where the forward makes something of it itself (Falcon's ALiBi).
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(backbone.forward))))
    except (OSError, TypeError, SyntaxError):
        return _Masks(False, False)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    reads = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "attention_mask"]
    handed = [value for value in _given(tree, "attention_mask") if value in reads]
    kinds = [node.value for node in ast.walk(tree) if isinstance(node, ast.NamedExpr) and node.value in reads]
    old = [
        value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self._update_causal_mask"
        for value in node.args
        if value in reads
    ]
    made = bool(old) or "create_causal_mask" in names
    positions = any(isinstance(value, ast.Name) and value.id == "position_ids" for value in _given_to_masks(tree))
    return _Masks(
        made and len(handed) + len(kinds) + len(old) == len(reads),
        positions,
        "create_sliding_window_causal_mask" in names,
        bool(kinds),
        bool(old),
    )


def _given(tree: ast.AST, name: str) -> Iterator[ast.expr]:
    """The values that go by ``name`` into a call or a dict."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == name:
            yield node.value
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values):
                if isinstance(key, ast.Constant) and key.value == name:
                    yield value


def _given_to_masks(tree: ast.AST) -> Iterator[ast.expr]:
    """The positions that functions which make masks are given, directly or by a dict of arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield from _given(node, "position_ids")
        if isinstance(node, ast.Call) and "mask" in ast.unparse(node.func):
            yield from _given(node, "position_ids")


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


__all__ = ["CU_SEQLENS", "DocumentsApart", "attention_is_stock", "backbones", "warn_of_crossing"]
