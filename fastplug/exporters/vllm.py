"""``vllm``: a folder that vLLM serves, and the command that serves it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fastplug.errors import OptionError
from fastplug.exporters.api import ExportError, ExportResult
from fastplug.exporters.assembly import Merged, write_merged
from fastplug.exporters.lora import lora
from fastplug.exporters.models import adapter_configs, base_of, local_folder
from fastplug.exporters.proof import Proof
from fastplug.exporters.quantized.formats import FORMS

WEIGHTS = {"16bit": "merged_16bit", "fp8": "fp8", "int8": "int8", "w4a16": "w4a16", "4bit": "merged_4bit"}
COMMAND = "vllm.txt"
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes


def vllm(
    model: Any,
    path: str | os.PathLike[str],
    *,
    weights: Literal["16bit", "fp8", "int8", "w4a16", "4bit", "adapter"] = "16bit",
    adapter: str | Sequence[str] | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> ExportResult:
    """Write a merged model or an adapter for vLLM. ``vllm.txt`` and the notes say how to serve it.

    Args:
        model: As for :func:`~fastplug.exporters.merged.merged_16bit`.
        path: The folder to make.
        weights: ``"16bit"``, ``"fp8"``, ``"int8"``, ``"w4a16"`` and ``"4bit"`` merge the adapter; ``"adapter"`` writes
            it alone, to be served on its base.
        adapter: As for ``merged_16bit``.
        tokenizer: As for ``merged_16bit``.
        texts: As for ``merged_16bit``.
        overwrite: Replace an existing export.
        verify: As for ``merged_16bit``; the proof runs in transformers.

    Raises:
        ExportError: An adapter that vLLM does not serve; and what ``merged_16bit`` raises.
        OptionError: Other ``weights``.
    """
    final = Path(os.path.abspath(os.path.expanduser(path)))
    if weights == "adapter":
        names = adapter if adapter is None or isinstance(adapter, (str, list, tuple)) else os.fspath(adapter)  # type: ignore[arg-type]
        command = _adapter_command(model, final, names)
        result = lora(
            model, path, adapter=names, tokenizer=tokenizer, texts=texts, overwrite=overwrite, verify=verify,
            extra={COMMAND: command + "\n"},
        )  # fmt: skip
    elif weights in WEIGHTS:
        command = f"vllm serve {shlex.quote(str(final))}"

        def finish(folder: Path, _: Proof | None) -> list[str]:
            (folder / COMMAND).write_text(command + "\n", encoding="utf-8")
            return []

        form: Merged = FORMS[WEIGHTS[weights]]
        result = write_merged(
            model, path, form, adapter=adapter, tokenizer=tokenizer, texts=texts, overwrite=overwrite, verify=verify,
            finish=finish,
        )  # fmt: skip
    else:
        known = ", ".join(map(repr, (*WEIGHTS, "adapter")))
        raise OptionError(f"fastplug: vllm has no weights={weights!r}; one of {known}")
    return replace(result, format="vllm", notes=(*result.notes, f"Serve it with: {command}"))


def _adapter_command(model: Any, final: Path, adapter: Any) -> str:
    configs = adapter_configs(model)
    chosen = [adapter] if isinstance(adapter, str) else list(adapter or configs)
    if len(chosen) != 1:
        raise ExportError(f"fastplug: vLLM serves one adapter a folder; name one of {', '.join(chosen) or 'them'}")
    config = configs.get(chosen[0])
    if config is None:  # the exporter names the known ones
        return ""
    for name in ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias", "target_parameters"):
        if getattr(config, name, None):
            raise ExportError(
                f'fastplug: vLLM does not serve an adapter with {name}; weights="16bit" merges it into the model'
            )
    pattern = getattr(config, "rank_pattern", None) or {}
    rank = max((config.r, *pattern.values()))
    limit = next((size for size in _RANKS if size >= rank), None)
    if limit is None:
        raise ExportError(
            f'fastplug: vLLM serves adapters up to rank {_RANKS[-1]}, not {rank}; weights="16bit" merges it'
        )
    named = getattr(base_of(model), "name_or_path", "") or config.base_model_name_or_path or "BASE"
    source = local_folder(named) if os.path.isdir(named) else None
    return (
        f"vllm serve {shlex.quote(str(source.resolve() if source else named))} --enable-lora --max-lora-rank {limit} "
        f"--lora-modules {shlex.quote(f'{final.name}={final}')}"
    )
