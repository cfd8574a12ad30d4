"""``save_pretrained`` of a model with QuantLinear layers: never packed bytes where a model is expected."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

import fastplug
from fastplug.errors import ModelError
from fastplug.layers import dequantize_, load, quantize_, save
from tests import models

transformers = pytest.importorskip("transformers")
REFUSED = r"layers\.0\.\S+ as packed bytes, which from_pretrained cannot load; fastplug\.layers\.save\(model, path\)"


@pytest.mark.parametrize("quant", ["nf4", "hqq"])
def test_it_is_an_error_of_this_one_model(quant, tmp_path):
    model = quantize_(models.plain(), quant)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ModelError, match=REFUSED):
            one.save_pretrained(tmp_path / "out")
        assert one.save_pretrained._model() is one
    assert not (tmp_path / "out").exists()
    models.plain().save_pretrained(tmp_path / "out")  # others of its class are as they were


def test_a_loaded_one_and_one_that_fastplug_patched(tmp_path):
    models.plain().save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", "hqq", device="cpu")
    fastplug.apply(model)
    for one in (model, copy.deepcopy(model), load(save(model, tmp_path / "plain", dequantize=True), device="cpu")):
        with pytest.raises(ModelError, match=REFUSED):
            one.save_pretrained(tmp_path / "out")
    assert "save_pretrained" not in vars(load(tmp_path / "base", None, device="cpu"))


def test_plain_layers_are_written_as_ever(tmp_path):
    model = dequantize_(quantize_(models.plain(), "hqq"))
    model.save_pretrained(tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = models.batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_adapters_are_written_and_the_base_under_them_is_not(tmp_path):
    peft = pytest.importorskip("peft")
    model = quantize_(models.lora(models.plain()), "hqq")
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(models.plain(), tmp_path / "adapter")
    states = [peft.get_peft_model_state_dict(part) for part in (model, again)]
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    with pytest.raises(ModelError, match="packed bytes"):
        model.unload().save_pretrained(tmp_path / "base")


def test_it_does_not_keep_the_model_alive():
    model = quantize_(models.plain(), "hqq")
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
