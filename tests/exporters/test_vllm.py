from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

import peft

import fastplug
from fastplug.errors import OptionError
from fastplug.exporters import ExportError
from fastplug.exporters.folder import verify_manifest
from tests.exporters.models import DTYPE, adapted, llama, read


def test_merged_folder_and_command(tmp_path: Path) -> None:
    out = tmp_path / "my model"
    result = fastplug.export(adapted(llama()), out, "vllm")
    assert result.format == "vllm"
    assert result.notes[-1] == f"Serve it with: vllm serve '{out}'"
    assert (out / "vllm.txt").read_text() == f"vllm serve '{out}'\n"
    assert {"config.json", "model.safetensors"} <= set(result.files)
    assert result.proof is not None
    assert verify_manifest(out) == ()
    with pytest.raises(OptionError, match=r"no weights='int4'; one of '16bit', 'fp8'"):
        fastplug.export(adapted(llama()), tmp_path / "none", "vllm", weights="int4")


def test_adapter_folder_and_command(tmp_path: Path) -> None:
    import transformers

    llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **{DTYPE: torch.bfloat16})
    model = adapted(base, r=4, rank_pattern={"q_proj": 12})
    result = fastplug.export(model, tmp_path / "mine", "vllm", weights="adapter")
    command = (tmp_path / "mine/vllm.txt").read_text().strip()
    assert command == (
        f"vllm serve {tmp_path / 'base'} --enable-lora --max-lora-rank 16 --lora-modules mine={tmp_path / 'mine'}"
    )
    assert result.proof is not None
    assert result.proof.kl < 1e-9
    assert "model.safetensors" not in result.files
    assert all("lora_" in name for name in read(tmp_path / "mine"))


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"r": 600, "target_modules": ["q_proj"]}]
)
def test_adapters_that_vllm_does_not_serve(tmp_path: Path, options: dict[str, Any]) -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(**{"target_modules": "all-linear", **options}))
    with pytest.raises(ExportError, match='weights="16bit" merges it'):
        fastplug.export(model, tmp_path / "out", "vllm", weights="adapter")
    assert not list(tmp_path.iterdir())
