"""LoRA+'s parameter groups."""

from __future__ import annotations

import pytest
import torch

from fastplug.errors import ModelError, OptionError
from fastplug.layers import LoRALinear, loraplus_groups
from tests import models

peft = pytest.importorskip("peft")


def test_they_are_peft_s(device):
    from peft.optimizers import create_loraplus_optimizer

    model = models.lora(models.plain("qwen2"), modules_to_save=["lm_head"], target_modules=["q_proj", "embed_tokens"])
    ours = loraplus_groups(model, 1e-4, ratio=8, weight_decay=0.1)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=8, loraplus_weight_decay=0.1, loraplus_lr_embedding=1e-6
    )
    theirs = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    mine = {id(p): group["lr"] for group in ours for p in group["params"]}
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert mine.keys() == theirs.keys() == trained.keys()
    for key, name in trained.items():
        if "embedding" not in name:  # PEFT gives B of an embedding that rate in some versions only
            assert mine[key] == pytest.approx(theirs[key]), name
        else:
            assert mine[key] == 1e-6


def test_groups_of_dora_and_biases():
    model = models.lora(models.plain("qwen2"), use_dora=True, bias="all")
    groups = {group["name"]: group for group in loraplus_groups(model, 1e-4, 16, 0.01)}
    assert groups["B"]["lr"] == pytest.approx(1.6e-3)
    assert groups["B"]["weight_decay"] == 0.01
    rest = groups["A and others, no decay"]
    assert rest["lr"] == 1e-4
    assert rest["weight_decay"] == 0.0
    assert all(p.dim() == 1 for p in rest["params"])
    torch.optim.AdamW(list(groups.values()))


def test_without_peft():
    layer = LoRALinear(torch.nn.Linear(8, 8), 2)
    assert {group["name"] for group in loraplus_groups(layer, 1e-4)} == {"B", "A and others"}


def test_bad_input():
    with pytest.raises(ModelError, match="trains no B"):
        loraplus_groups(models.plain(), 1e-4)
    with pytest.raises(OptionError, match="must be positive"):
        loraplus_groups(models.lora(models.plain()), -1.0)
