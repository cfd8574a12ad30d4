"""``fastplug expand``: from folder to folder, the same model as ``expand_blocks`` makes."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from fastplug.cli import app
from fastplug.errors import ModelError, OptionError
from fastplug.exporters.folder import verify_manifest
from fastplug.layers import expand_blocks, load, quantize_, save
from fastplug.layers.expansion_files import expand_folder
from tests import models

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "model"
    model = models.plain("qwen3", num_hidden_layers=4, tie_word_embeddings=True).to(torch.bfloat16)
    model.save_pretrained(path, max_shard_size="100KB")
    return path


def test_it_writes_what_expand_blocks_makes(folder, tmp_path):
    out = expand_folder(folder, tmp_path / "out", every=2, max_shard_size="200KB")
    assert not verify_manifest(out)
    written = transformers.AutoModelForCausalLM.from_pretrained(out, torch_dtype=torch.bfloat16)
    live = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16)
    expand_blocks(live, every=2)
    state = live.state_dict()
    assert written.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in written.state_dict().items())
    assert written.config.num_hidden_layers == 6
    assert written.config.layer_types == live.config.layer_types
    assert written.dtype == torch.bfloat16


def test_4_bit_weights(tmp_path):
    base = quantize_(models.plain().eval())
    folder = save(base, tmp_path / "base")
    out = load(expand_folder(folder, tmp_path / "out", count=1), device="cpu")
    ids = models.batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(out(ids).logits, base(ids).logits)
    assert out.config.num_hidden_layers == 3


def test_command(folder, tmp_path):
    result = CliRunner().invoke(app, ["expand", str(folder), "--every", "4", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "4 blocks became 5" in result.output
    again = CliRunner().invoke(app, ["expand", str(folder), "--every", "4", "--out", str(tmp_path / "out")])
    assert again.exit_code != 0
    assert "exists" in again.output


def test_bad_input(folder, tmp_path):
    with pytest.raises(OptionError, match="every=5 is impossible with 4 blocks"):
        expand_folder(folder, tmp_path / "out", every=5)
    with pytest.raises(ModelError, match="neither a folder"):
        expand_folder(tmp_path / "none", tmp_path / "out", every=1)
    assert not (tmp_path / "out").exists()
