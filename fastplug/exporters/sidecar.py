"""The files beside the weights: config, generation config, tokenizer and chat template, provenance."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import fastplug
from fastplug.exporters.api import ExportError
from fastplug.exporters.models import adapter_configs, local_folder

# What tokenizers and processors consist of. Copied byte for byte where they come from a folder: a tokenizer that one
# version of transformers loads and saves may not load in another.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
_MARKERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
PROVENANCE = "fastplug.json"


def write_config(
    base: Any,
    folder: Path,
    dtype: torch.dtype,
    *,
    untie: bool = False,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write ``config.json`` as ``save_pretrained`` of the plain model would; ``base`` keeps its own config.

    Args:
        base: The model.
        folder: Where to.
        dtype: Of the weights.
        untie: Turn ``tie_word_embeddings`` off.
        quantization: The ``quantization_config`` of what is written.
    """
    config = copy.deepcopy(base.config)
    for part in (config, *_parts(config)):
        for name in ("quantization_config", "_pre_quantization_dtype", "_attn_implementation_autoset"):
            if hasattr(part, name):
                delattr(part, name)
        if part is config or getattr(part, "dtype", getattr(part, "torch_dtype", None)) is not None:
            setattr(part, "dtype" if hasattr(part, "dtype") else "torch_dtype", str(dtype).removeprefix("torch."))
        if untie and getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
    config.architectures = [type(base).__name__.removeprefix("FSDP")]
    if quantization is not None:
        config.quantization_config = dict(quantization)
    config.save_pretrained(folder)


def ties_embeddings(config: Any) -> bool:
    """Whether a model of this config ties its head to its embedding when it loads."""
    return any(getattr(part, "tie_word_embeddings", False) for part in (config, *_parts(config)))


def _parts(config: Any) -> list[Any]:
    """The configs inside of a config (a vision-language model has one per modality)."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [part for part in parts if part is not None]


def write_generation_config(base: Any, folder: Path) -> list[str]:
    """Write ``generation_config.json`` for a model that generates; returns notes."""
    if not base.can_generate() or getattr(base, "generation_config", None) is None:
        return []
    try:
        base.generation_config.save_pretrained(folder)
    except ValueError as error:  # transformers refuses to save contradictory settings, but the model runs on them
        base.generation_config.to_json_file(folder / "generation_config.json")
        return [f"The generation config contradicts itself and was written as it is: {str(error).splitlines()[0]}"]
    return []


def write_tokenizer(tokenizer: Any, base: Any, folder: Path, places: Iterable[str], rows: int | None) -> list[str]:
    """Write the tokenizer; returns notes.

    Args:
        tokenizer: A tokenizer or processor, the folder of one, or None to look in ``places``.
        base: The model, for messages.
        folder: Where to write.
        places: Folders or model ids to look in, best first. Ids are looked up in the local cache alone.
        rows: Rows of the embedding; a tokenizer with more tokens cannot be the model's.

    Raises:
        ExportError: A tokenizer that does not fit the embedding, or a folder without one.
    """
    if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)):
        inner = getattr(tokenizer, "tokenizer", tokenizer)
        if rows is not None and hasattr(inner, "__len__") and len(inner) > rows:
            raise ExportError(
                f"fastplug: the tokenizer has {len(inner)} tokens but the embedding of {type(base).__name__} only "
                f"{rows} rows; call model.resize_token_embeddings(len(tokenizer)) before training"
            )
        tokenizer.save_pretrained(folder)
        return []
    if tokenizer is not None:
        if not _copy_tokenizer(Path(tokenizer), folder):
            raise ExportError(f"fastplug: {os.fspath(tokenizer)} has no tokenizer ({', '.join(_MARKERS)})")
        return []
    for place in places:
        for marker in _MARKERS:
            found = local_folder(place, marker)
            if found is not None and _copy_tokenizer(found, folder):
                return []
    return ["No tokenizer was found beside the base or the adapter; pass tokenizer=... to have it in the folder."]


def _copy_tokenizer(source: Path, folder: Path) -> bool:
    if not any((source / name).is_file() for name in _MARKERS):
        return False
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for item in (*source.glob("*.tiktoken"), *(source / "additional_chat_templates").glob("*.jinja")):
        target = folder / item.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(item, target)
    return True


def write_provenance(model: Any, base: Any, folder: Path, kind: str, adapters: Iterable[str], **facts: Any) -> None:
    """Write ``fastplug.json``: which base and adapters the weights come from, and what was done to them."""
    import transformers

    configs = adapter_configs(model)
    described = {}
    for name in adapters:
        config = configs[name]
        keys = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
        described[name] = {key: _plain(getattr(config, key)) for key in keys if hasattr(config, key)}
    content = {
        "fastplug": fastplug.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "format": kind,
        "base": getattr(base, "name_or_path", "") or base.config.model_type,
        "architecture": type(base).__name__,
        "adapters": described,
        **facts,
    }
    (folder / PROVENANCE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)
