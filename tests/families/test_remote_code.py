"""A model whose code comes with its checkpoint, loaded as its user trusts it: Llama, with every name of it changed.

Its source is transformers' own, rewritten into a folder: other class names, other attribute names, and an MLP whose
linear layers stand in another order. No row matches it, and no name helps.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import dynamic_module_utils
from transformers.models.llama import modeling_llama

import fastplug
from fastplug.families.structural import NAME
from tests import models
from tests.engine.step import assert_equal, fallbacks, step

NAMES = {
    "Llama": "Zebra", "self_attn": "mixer", "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "back",
    "mlp": "ff", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "act_fn": "nonlinearity",
    "post_attention_layernorm": "norm_b", "input_layernorm": "norm_a", "variance_epsilon": "epsilon",
}  # fmt: skip
LINEARS = ["to_q", "to_k", "to_v", "back", "w1", "w2", "w3"]
CONFIG = """
from transformers import LlamaConfig

class ZebraConfig(LlamaConfig):
    model_type = "zebra"
"""


def rewritten() -> str:
    """The source of Llama's module under other names, with relative imports made absolute."""
    source = inspect.getsource(modeling_llama)
    source = re.sub(r"from \.\.\.(\w+)", r"from transformers.\1", source)
    source = source.replace("from ... import", "from transformers import")
    source = source.replace("from .configuration_llama import", "from .configuration_zebra import")
    for old, new in NAMES.items():
        source = re.sub(rf"\b{old}\b" if old.islower() else old, new, source)
    gate, up, down = (
        re.findall(rf"^ +self\.{name} = nn\.Linear.*\n", source, re.MULTILINE)[0] for name in ("w1", "w3", "w2")
    )
    return source.replace(gate + up + down, down + up + gate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint with its code."""
    path = tmp_path_factory.mktemp("zebra")
    (path / "modeling_zebra.py").write_text(rewritten(), encoding="utf-8")
    (path / "configuration_zebra.py").write_text(CONFIG, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        plain = models.plain()
        state = {}
        for key, value in plain.state_dict().items():
            for old, new in NAMES.items():
                key = key.replace(f".{old}.", f".{new}.")
            state[key] = value
        kind = dynamic_module_utils.get_class_from_dynamic_module("modeling_zebra.ZebraForCausalLM", str(path))
        values = {k: v for k, v in plain.config.to_dict().items() if k not in ("model_type", "architectures")}
        model = kind(kind.config_class(**values))
        model.load_state_dict(state)
        model.save_pretrained(path)
        config = json.loads((path / "config.json").read_text())
        config["auto_map"] = {
            "AutoConfig": "configuration_zebra.ZebraConfig",
            "AutoModelForCausalLM": "modeling_zebra.ZebraForCausalLM",
        }
        (path / "config.json").write_text(json.dumps(config))
        yield path


@pytest.fixture
def model(folder: Path) -> Any:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    loaded.generation_config.pad_token_id = 0
    assert type(loaded).__module__.startswith("transformers_modules.")
    return loaded.train()


def test_it_is_llama(model: Any) -> None:
    """So the numbers that fastplug gives for Llama are those that it has to give here."""
    assert torch.equal(model(**models.batch()).loss, models.plain()(**models.batch()).loss)
    ff = model.model.layers[0].ff
    assert [name for name, _ in ff.named_children()][:3] == ["w2", "w3", "w1"]


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_patched_by_structure(model: Any, kind: str) -> None:
    if kind == "qlora":
        model = models.quantized(model, names=tuple(LINEARS))
    if kind != "full":
        model = models.lora(model, target_modules=LINEARS)
    twin = copy.deepcopy(model)
    report = fastplug.apply(twin).report
    assert {decision.family for decision in report.decisions} == {NAME}
    count = {role: sum(d.role == role for d in report.patched) for role in ("mlp", "linear", "lm_head_loss")}
    assert count == {"mlp": 2, "linear": 0 if kind == "full" else 2, "lm_head_loss": 1}
    assert sum(d.role == "norm" and "PyTorch's own norm" in str(d.reason) for d in report.decisions) == 5
    if kind != "full":
        mixers = [module for name, module in twin.named_modules() if name.endswith("mixer")]
        assert [set(m.__dict__["_fastplug"].family.shared) for m in mixers] == [
            {("to_q", "to_k", "to_v"), ("back",)}
        ] * 2
    assert_equal(step(twin, models.padded("left")), step(model, models.padded("left")))
    assert not fallbacks(twin), fallbacks(twin)


def test_trained_checkpointed_and_generating(model: Any) -> None:
    model = models.lora(model, target_modules=LINEARS, lora_dropout=0.1)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    twin = copy.deepcopy(model)
    fastplug.apply(twin)
    prompt = {key: value for key, value in models.batch(2, 70).items() if key != "labels"}
    samples = []
    for part in (twin, model):
        optimizer = torch.optim.AdamW([p for p in part.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(0)
        for seed in range(3):
            part.train()
            part(**models.batch(seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        part.gradient_checkpointing_disable()
        samples.append(part.eval().generate(**prompt, max_new_tokens=6, do_sample=False, num_beams=2))
    assert torch.equal(*samples)
    assert not fallbacks(twin)
    fastplug.undo(twin)
    assert {type(module) for module in twin.modules()} == {type(module) for module in model.modules()}


def test_it_saves_as_it_came(model: Any, folder: Path, tmp_path: Path) -> None:
    fastplug.apply(model)
    model.save_pretrained(tmp_path)
    for code in folder.glob("*.py"):
        shutil.copy(code, tmp_path)  # transformers 4.51 leaves it behind
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"]["AutoModelForCausalLM"].endswith("modeling_zebra.ZebraForCausalLM")
    assert saved["architectures"] == ["ZebraForCausalLM"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).train()
    fastplug.undo(model)
    assert_equal(step(loaded, models.batch()), step(model, models.batch()), bound=0)
