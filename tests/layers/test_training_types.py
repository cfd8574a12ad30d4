"""The training types by name, from the folder of a model to trained weights, fused and not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastplug.errors import ModelError
from fastplug.layers import expand_blocks, load, loraplus_groups, save
from tests import models

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from fastplug_hf import FastPlugCallback  # noqa: E402
from tests.hf import tiny  # noqa: E402

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "model"
    models.plain("qwen2", num_hidden_layers=2).save_pretrained(path)
    return path


def plain(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def adapted(model, **options):
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config)


def bitsandbytes(folder):
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def own(folder, quant):
    return load(folder, quant, device="cpu", dtype=torch.float32)


TYPES: dict[str, Callable[[Any], Any]] = {
    "full": plain,
    "lora": lambda folder: adapted(plain(folder)),
    "qlora": lambda folder: adapted(bitsandbytes(folder)),
    "qlora, QuantLinear": lambda folder: adapted(own(folder, "nf4")),
    "dora": lambda folder: adapted(plain(folder), use_dora=True),
    "qdora, bitsandbytes": lambda folder: adapted(bitsandbytes(folder), use_dora=True),
    "qdora, NF4": lambda folder: adapted(own(folder, "nf4"), use_dora=True),
    "qdora, HQQ": lambda folder: adapted(own(folder, "hqq"), use_dora=True),
    "hqq_lora": lambda folder: adapted(own(folder, "hqq")),
    "llama_pro": lambda folder: expand_blocks(plain(folder), every=1),
    "q_llama_pro, NF4": lambda folder: expand_blocks(own(folder, "nf4"), every=1),
    "q_llama_pro, HQQ": lambda folder: expand_blocks(own(folder, "hqq"), every=1),
}


def trained(model, folder, *callbacks, **changes):
    """The Trainer after its run, and what trained by name."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    before = {name: p.detach().clone().cpu() for name, p in model.named_parameters() if name in names}
    trainer = tiny.trainer(model, folder, *callbacks, max_steps=STEPS, learning_rate=1e-2, **changes)
    trainer.train()
    after = {name: p.detach().cpu() for name, p in trainer.model.named_parameters() if name in names}
    return trainer, {name: after[name] - before[name] for name in names}


@pytest.mark.parametrize("kind", TYPES)
def test_it_trains_as_it_does_unfused(folder, tmp_path, kind):
    model = TYPES[kind](folder)
    twin = copy.deepcopy(model)
    fused, ours = trained(model, tmp_path / "a", FastPlugCallback(), optim="sgd")
    plain, theirs = trained(twin, tmp_path / "b", optim="sgd")
    tiny.assert_fused(fused.model)
    assert tiny.losses(fused) == pytest.approx(tiny.losses(plain), rel=1e-4)
    assert tiny.losses(fused)[-1] != tiny.losses(fused)[0]
    assert ours.keys() == theirs.keys()
    scale = max(float(change.abs().max()) for change in theirs.values())
    assert scale > 0
    for name, change in theirs.items():
        assert float((ours[name] - change).abs().max()) <= 1e-3 * scale, name
    assert any(change.any() for change in ours.values())


@pytest.mark.parametrize("kind", ["llama_pro", "q_llama_pro, NF4", "q_llama_pro, HQQ"])
def test_expanded_models_go_on_as_plain_ones(folder, tmp_path, kind):
    model = TYPES[kind](folder)
    _, changes = trained(model, tmp_path / "a", FastPlugCallback())
    assert all(name.split(".")[2] in ("1", "3") for name in changes)
    written = tmp_path / "written"
    if kind == "llama_pro":
        model.save_pretrained(written)
    else:
        save(model, written, dequantize="HQQ" in kind)
    read = load if "NF4" in kind else transformers.AutoModelForCausalLM.from_pretrained
    again = read(written)
    ids = models.batch()["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quant", ["nf4", "hqq"])
def test_a_run_over_quantized_blocks_resumes_from_its_checkpoint(folder, tmp_path, quant):
    """The Trainer writes checkpoints with ``save_pretrained``, which makes no finished model of packed bytes."""
    options = dict(optim="sgd", max_steps=STEPS, learning_rate=1e-2, save_strategy="steps", save_steps=2)
    runs = []
    for resumed in (None, tmp_path / "checkpoint-2"):
        model = expand_blocks(own(folder, quant), every=1)
        runs.append(tiny.trainer(model, tmp_path, FastPlugCallback(), **options))
        runs[-1].train(resume_from_checkpoint=resumed and str(resumed))
    assert tiny.losses(runs[1]) == pytest.approx(tiny.losses(runs[0]), rel=1e-6)
    first, second = (run.model.state_dict() for run in runs)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match=r"packed bytes, which from_pretrained cannot load; fastplug\.layers\.save"):
        runs[1].save_model(str(tmp_path / "final"))


def test_lora_plus_in_a_trainer(folder, tmp_path):
    runs = []
    for callbacks in ([FastPlugCallback()], []):
        model = adapted(plain(folder))
        groups = loraplus_groups(model, lr=1e-2, ratio=4)
        trainer = tiny.trainer(model, tmp_path / str(len(runs)), *callbacks, max_steps=STEPS)
        trainer.optimizer = torch.optim.SGD(groups, lr=1e-2)
        trainer.train()
        runs.append(trainer)
    assert tiny.losses(runs[0]) == pytest.approx(tiny.losses(runs[1]), rel=1e-4)
    rates = {group["name"]: group["initial_lr"] for group in runs[0].optimizer.param_groups}
    assert rates["B"] == pytest.approx(4 * rates["A and others"])
