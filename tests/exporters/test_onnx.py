from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import fastplug
from fastplug.errors import OptionError
from fastplug.exporters.folder import verify_manifest
from fastplug.exporters.proof import ProofError
from tests.exporters.models import adapted, llama

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kv_cache", [True, False])
def test_decoder_in_onnxruntime(tmp_path: Path, kv_cache: bool) -> None:
    """Batch, sequence and past are free; generation step by step gives the tokens of the live model."""
    import numpy as np
    import onnx
    import onnxruntime

    model = adapted(llama(tied=kv_cache, dtype=torch.float32), modules_to_save=None if kv_cache else ["lm_head"])
    result = fastplug.export(model, tmp_path / "out", "onnx", kv_cache=kv_cache)
    assert result.proof is not None
    assert result.proof.candidate.startswith("onnxruntime")
    assert result.proof.kl < 1e-9
    assert {"model.onnx", "model.onnx.data", "config.json"} <= set(result.files)
    assert verify_manifest(tmp_path / "out") == ()
    onnx.checker.check_model(str(tmp_path / "out/model.onnx"))

    session = onnxruntime.InferenceSession(str(tmp_path / "out/model.onnx"), providers=["CPUExecutionProvider"])
    shapes = {node.name: node.shape for node in session.get_inputs()}
    assert shapes["input_ids"] == ["batch", "sequence"]
    ids = torch.randint(3, 90, (3, 6))
    tokens = ids.clone()
    with torch.no_grad():
        for _ in range(4):
            tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1].argmax(-1, keepdim=True)], 1)
    past = {name: np.zeros((3, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items() if "past" in name}
    assert len(past) == (4 if kv_cache else 0)
    made, step = ids, ids
    for _ in range(4):
        length = made.shape[1]
        feed = {
            "input_ids": step.numpy(),
            "attention_mask": np.ones((3, length), np.int64),
            "position_ids": torch.arange(length - step.shape[1], length).expand(3, -1).contiguous().numpy(),
        }
        logits, *present = session.run(None, {**{k: v for k, v in feed.items() if k in shapes}, **past})
        past = dict(zip(past, present))
        new = torch.from_numpy(logits)[:, -1].argmax(-1, keepdim=True)
        made = torch.cat([made, new], 1)
        step = new if kv_cache else made
    assert torch.equal(made, tokens)


def test_a_damaged_file_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastplug.exporters.onnx import exporter

    write = exporter._write_graph

    def damaged(decoder: object, file: Path) -> None:
        write(decoder, file)  # type: ignore[arg-type]
        data = file.with_name("model.onnx.data")
        data.write_bytes(bytes(data.stat().st_size // 2) + data.read_bytes()[data.stat().st_size // 2 :])

    monkeypatch.setattr(exporter, "_write_graph", damaged)
    with pytest.raises(ProofError, match="not the live model"):
        fastplug.export(adapted(llama()), tmp_path / "out", "onnx")
    assert not list(tmp_path.iterdir())


def test_options(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'kv_cache'"):
        fastplug.export(llama(), tmp_path / "out", "onnx", kvcache=True)
