"""The model card: base, data, adapters, fastplug's options, and the measured parity."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import fastplug
from fastplug.errors import FastPlugError
from fastplug.exporters.api import ExportResult
from fastplug.exporters.models import base_of
from fastplug.exporters.sidecar import PROVENANCE

_RELATION = {"lora": "adapter", "merged_16bit": "finetune", "merged_32bit": "finetune"}


def model_card(
    model: Any, repo: str, result: ExportResult, *, data: Sequence[str] = (), license: str | None = None
) -> str:
    """The text of ``README.md``.

    Args:
        model: The live model.
        repo: Its name on the hub, for the example.
        result: What was written.
        data: What it was trained on: dataset ids of the hub, or plain words.
        license: The license's identifier on the hub; None leaves it out.
    """
    provenance = json.loads((result.path / PROVENANCE).read_text(encoding="utf-8"))
    base = _hub_id(getattr(base_of(model), "name_or_path", "") or "")
    facts: dict[str, Any] = {"library_name": "peft" if result.format == "lora" else "transformers"}
    if base:
        facts |= {"base_model": base, "base_model_relation": _RELATION.get(result.format, "quantized")}
    if license:
        facts["license"] = license
    if ids := [name for name in data if _hub_id(name)]:
        facts["datasets"] = ids
    facts |= {"pipeline_tag": "text-generation", "tags": ["fastplug", result.format]}

    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in facts.items()),
        "---",
        "",
        f"# {repo.split('/')[-1]}",
    ]
    described = f"`{base}`" if base else f"a {provenance['architecture']} that is not on the hub"
    lines += ["", f"Fine-tuned from {described}, written by fastplug {fastplug.__version__} as `{result.format}`.", ""]
    lines += ["| | |", "|---|---|", f"| base | {described} |", f"| data | {', '.join(data) or 'not stated'} |"]
    for name, config in provenance["adapters"].items():
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type", "adapter")
        lines.append(f"| adapter `{name}` | {kind}, rank {config.get('r')}, alpha {config.get('lora_alpha')} |")
    if onto := provenance.get("merged_onto"):
        lines.append(f"| merged onto | {onto} |")
    lines.append(f"| fastplug options | {_options(model)} |")
    lines += ["", "## Measured parity", ""]
    if result.proof is None:
        lines.append("Not measured: the file was written without verification or the base was not at hand.")
    else:
        proof = result.proof
        lines += [
            f"The uploaded files in {proof.candidate} against the model as it was trained, on {proof.positions} "
            f"positions ({proof.sample}), both in fp32 arithmetic:",
            "",
            "| | |",
            "|---|---|",
            f"| KL divergence (mean) | {proof.kl:.2e} |",
            f"| largest logit difference | {proof.logits:.3g} |",
            f"| top-1 agreement | {proof.top1:.2%} |",
            f"| perplexity, these files | {proof.perplexity_candidate:.4g} |",
            f"| perplexity, live model | {proof.perplexity_reference:.4g} |",
        ]
    lines += ["", *(f"- {note}" for note in result.notes)] if result.notes else []
    lines += ["", "`SHA256SUMS` lists the checksums (`sha256sum -c SHA256SUMS`), `fastplug.json` the provenance.", ""]
    return "\n".join(lines)


def _hub_id(name: str) -> str:
    """``name`` if it is a name on the hub and not a folder of this machine, which a card should not tell."""
    plain = name.count("/") <= 1 and not name.startswith((".", "/", "~")) and " " not in name and name
    return name if plain and "/" in name and not os.path.isdir(name) else ""


def _options(model: Any) -> str:
    try:
        options = fastplug.report(model).options
    except (FastPlugError, AttributeError):
        return "not in use while it was exported"
    changed = options if isinstance(options, dict) else getattr(options, "__dict__", {})
    return ", ".join(f"`{name}={value}`" for name, value in changed.items()) or "defaults"


__all__ = ["model_card"]
