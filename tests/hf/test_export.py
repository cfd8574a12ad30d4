"""``FastPlugCallback(export=...)``: the trained model is written when training ends well, or it says why not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from fastplug.errors import OptionError
from fastplug.run_exports import parse_exports
from fastplug_hf import FastPlugCallback
from tests import models
from tests.hf import tiny

peft = pytest.importorskip("peft")


def run(folder: Path, *callbacks: Any, model: Any = None, **changes: Any) -> Any:
    made = tiny.trainer(
        model or models.lora(models.plain("llama")), folder, *callbacks, max_steps=1,
        processing_class=tiny.tokenizer(), **changes,
    )  # fmt: skip
    made.train()
    return made


def test_the_trained_model_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastplug"):
        exports = {"merged_16bit": {"dtype": "float16"}, "lora": None}
        made = run(tmp_path, FastPlugCallback(export=exports, undo_at_end=True))
    assert f"fastplug: wrote merged_16bit to {tmp_path / 'merged_16bit'} (" in caplog.text
    tokens = torch.randint(3, models.VOCABULARY, (2, 9))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged_16bit")
    assert merged.dtype == torch.float16
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged_16bit")) == len(tiny.tokenizer())
    adapted = peft.PeftModel.from_pretrained(models.plain("llama"), tmp_path / "lora")
    assert not tiny.patched(made.model)
    with torch.no_grad():
        expected = made.model.eval()(input_ids=tokens).logits
        assert torch.allclose(adapted.eval()(input_ids=tokens).logits, expected, atol=1e-5)
        assert torch.allclose(merged.float().eval()(input_ids=tokens).logits, expected, atol=0.05)


def test_a_later_run_replaces_it(tmp_path: Path) -> None:
    first = json.loads((run_lora(tmp_path) / "adapter_config.json").read_text())
    second = json.loads((run_lora(tmp_path, r=8) / "adapter_config.json").read_text())
    assert (first["r"], second["r"]) == (4, 8)


def run_lora(folder: Path, **options: Any) -> Path:
    run(folder, FastPlugCallback(export="lora"), model=models.lora(models.plain("llama"), **options))
    return folder / "lora"


def test_a_failing_export_does_not_lose_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = run(tmp_path, FastPlugCallback(export=["lora", "merged_16bit"]), model=models.plain("llama"))
    assert made.state.global_step == 1
    assert "could not be written as lora (fastplug: LlamaForCausalLM has no adapter to write" in caplog.text
    assert (tmp_path / "merged_16bit" / "config.json").is_file()
    assert not (tmp_path / "lora").exists()
    with pytest.raises(Exception, match="has no adapter to write"):
        run(tmp_path, FastPlugCallback(export="lora", strict=True), model=models.plain("llama"))


class Fail(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError


def test_a_failed_run_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^$"):
        run(tmp_path, FastPlugCallback(export="merged_16bit"), Fail())
    assert not (tmp_path / "merged_16bit").exists()


def test_the_option_is_checked_before_training() -> None:
    assert parse_exports(None) == {}
    assert parse_exports("lora") == parse_exports(["lora"]) == parse_exports({"lora": None}) == {"lora": {}}
    assert parse_exports({"merged_16bit": {"dtype": "float16"}}) == {"merged_16bit": {"dtype": "float16"}}
    for given, message in (
        ("merged_16bits", "did you mean 'merged_16bit'"),
        ({"merged_16bit": {"dtypes": "float16"}}, "did you mean 'dtype'"),
        ({"merged_16bit": "float16"}, "a mapping of formats to their options, not"),
        (True, "export must be a format such as 'merged_16bit'.*, not True"),
        ([[]], "export must be a format"),
    ):
        with pytest.raises(OptionError, match=message):
            FastPlugCallback(export=given)  # type: ignore[arg-type]
