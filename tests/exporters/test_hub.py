from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("huggingface_hub", minversion="1.0")

import fastplug
from fastplug.errors import OptionError
from fastplug.exporters import ExportError
from fastplug.exporters.folder import list_files, verify_manifest
from tests.exporters.hub import FakeHub
from tests.exporters.models import adapted, llama


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the fake one speaks plain LFS
    with FakeHub() as server:
        yield server


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    found = adapted(llama(), use_dora=True, target_modules=["q_proj"])
    found.get_base_model().name_or_path = "someone/base-model"
    return found


def push(model: Any, hub: FakeHub, **options: Any) -> Any:
    return fastplug.export(model, "me/tuned", "hub", endpoint=hub.endpoint, token="hf_x", **options)


def test_push_with_a_card(model: Any, hub: FakeHub, tmp_path: Path) -> None:
    result = push(
        model, hub, folder=tmp_path / "kept", data=["me/dialogs", "my own notes"], license="apache-2.0",
        max_shard_size="20KB",
    )  # fmt: skip
    assert result.path == Path("me/tuned")
    assert result.notes[-1] == f"Pushed to {hub.endpoint}/me/tuned."
    assert hub.private["me/tuned"]
    pushed = hub.files["me/tuned"]
    assert set(pushed) == set(list_files(tmp_path / "kept"))
    assert len([name for name in pushed if name.endswith(".safetensors")]) > 1
    for name, data in pushed.items():
        assert data == (tmp_path / "kept" / name).read_bytes()
    assert verify_manifest(tmp_path / "kept") == ()
    assert all(token == "Bearer hf_x" for method, path, token in hub.requests if method != "PUT" and "/api/" in path)

    card = pushed["README.md"].decode()
    head = card.split("---")[1]
    for line in (
        'base_model: "someone/base-model"', 'base_model_relation: "finetune"', 'datasets: ["me/dialogs"]',
        'license: "apache-2.0"', 'library_name: "transformers"',
    ):  # fmt: skip
        assert line in head
    assert "| data | me/dialogs, my own notes |" in card
    assert "| adapter `default` | DoRA, rank 4, alpha 16 |" in card
    assert result.proof is not None
    assert f"| KL divergence (mean) | {result.proof.kl:.2e} |" in card
    assert str(tmp_path) not in card


def test_push_an_adapter_of_a_patched_model(model: Any, hub: FakeHub) -> None:
    applied = fastplug.apply(model)
    try:
        push(model, hub, weights="lora", private=False)
    finally:
        applied.undo()
    card = hub.files["me/tuned"]["README.md"].decode()
    assert not hub.private["me/tuned"]
    assert 'base_model_relation: "adapter"' in card
    assert 'library_name: "peft"' in card
    assert "| fastplug options | `" in card
    assert "Not measured" in card


def test_what_goes_wrong(model: Any, hub: FakeHub, tmp_path: Path) -> None:
    hub.refuse = 403
    with pytest.raises(ExportError, match=r"the hub did not take me/tuned: .*; folder=DIR keeps what was written"):
        push(model, hub, weights="lora")
    with pytest.raises(ExportError, match="the folder is kept as"):
        push(model, hub, weights="lora", folder=tmp_path / "kept")
    assert verify_manifest(tmp_path / "kept") == ()
    hub.refuse, hub.damage = 0, True
    with pytest.raises(ExportError, match=r"adapter_model\.safetensors did not arrive at me/tuned as it was sent"):
        push(model, hub, weights="lora")
    for name in ("/tmp/folder", "a/b/c", "two words"):
        with pytest.raises(OptionError, match="not the name of a repository"):
            fastplug.export(model, name, "hub", endpoint=hub.endpoint)
    with pytest.raises(OptionError, match="merged_16bit has no option 'dtyp'"):
        push(model, hub, dtyp="float16")
    with pytest.raises(OptionError, match="not hub itself"):
        push(model, hub, weights="hub")
