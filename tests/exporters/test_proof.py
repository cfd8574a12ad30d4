from __future__ import annotations

import copy
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")

import peft

from fastplug.exporters import ExportError
from fastplug.exporters.folder import verify_manifest
from fastplug.exporters.proof import Bound, LiveRuntime, ProofError, Recorded, Sample, compare, prove, sample_for
from tests.exporters.models import VOCABULARY, adapted, llama, train

LOOSE = Bound(kl=1e9, top1=0.0, perplexity=1e9)


class Fake:
    """A runtime of one function."""

    def __init__(self, function: Callable[[Tensor], Tensor], name: str = "fake") -> None:
        self.name, self.function, self.calls = name, function, 0

    def logits(self, token_ids: Tensor) -> Tensor:
        self.calls += 1
        return self.function(token_ids)


def table(seed: int = 0, size: int = 50) -> Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed)) * 2


SAMPLE = Sample((torch.arange(7),), (torch.arange(40), torch.tensor([3, 9])), "numbers")


def test_measures_are_those_of_the_textbook() -> None:
    one, two = table(0), table(0) + table(1) * 0.1
    proof = compare(Fake(lambda ids: one[ids]), Fake(lambda ids: two[ids]), SAMPLE)
    ids = torch.cat([*SAMPLE.prompts, *SAMPLE.texts])
    p, q = one[ids].double().log_softmax(-1), two[ids].double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert proof.positions == 49
    assert proof.kl == pytest.approx(float(kl.mean()), rel=1e-12)
    assert proof.kl_max == pytest.approx(float(kl.max()), rel=1e-12)
    assert proof.logits == pytest.approx(float((one[ids] - two[ids]).abs().max()))
    assert proof.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    for found, logs in ((proof.perplexity_reference, one), (proof.perplexity_candidate, two)):
        losses = [
            torch.nn.functional.cross_entropy(logs[text][:-1].double(), text[1:], reduction="sum")
            for text in SAMPLE.texts
        ]
        assert found == pytest.approx(math.exp(sum(map(float, losses)) / 40), rel=1e-12)
    assert "49 positions" in str(proof)
    assert proof.as_dict()["sample"] == "numbers"
    assert proof.failures() == []


def test_outside_of_the_bound_is_an_error() -> None:
    one, two = table(0), table(5)
    same = prove(Fake(lambda ids: one[ids]), Fake(lambda ids: one[ids]), SAMPLE, Bound(0.0, 1.0, 1.0))
    assert (same.kl, same.logits, same.top1) == (0.0, 0.0, 1.0)
    with pytest.raises(
        ProofError, match=r"KL .* \(allowed 0\.1\), top-1 agreement .*, perplexity .*--no-verify"
    ) as error:
        prove(Fake(lambda ids: one[ids]), Fake(lambda ids: two[ids]), SAMPLE, Bound(0.1, 0.9, 1.0))
    assert error.value.proof.kl > 1
    for broken in (float("nan"), float("inf")):
        with pytest.raises(ProofError, match="not finite"):
            prove(Fake(lambda ids: one[ids]), Fake(lambda ids, by=broken: one[ids] * by), SAMPLE, LOOSE)
    with pytest.raises(Exception, match=r"7 tokens gave logits at 7 \(fake\) and 6 \(short\) positions"):
        compare(Fake(lambda ids: one[ids]), Fake(lambda ids: one[ids][:-1], "short"), SAMPLE)
    padded = compare(Fake(lambda ids: one[ids]), Fake(lambda ids: torch.nn.functional.pad(one[ids], (0, 14))), SAMPLE)
    assert padded.kl == 0.0


def test_a_recorded_runtime_answers_once() -> None:
    one = Fake(lambda ids: table()[ids])
    recorded = Recorded(one)
    for _ in range(3):
        compare(recorded, one, SAMPLE)
    assert one.calls == 3 + 9
    assert recorded.name == "fake"


def test_the_live_model_is_left_as_it_was() -> None:
    model = adapted(llama(dtype=torch.float32), lora_dropout=0.5, modules_to_save=["lm_head"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    train(model).train()
    model.get_base_model().model.norm.eval()
    modes = [module.training for module in model.modules()]
    trains = [parameter.requires_grad for parameter in model.parameters()]
    ids = torch.arange(3, 20)
    default, other = LiveRuntime(model).logits(ids), LiveRuntime(model, ["other"]).logits(ids)
    base = LiveRuntime(model, enabled=False).logits(ids)
    assert modes == [module.training for module in model.modules()]
    assert trains == [parameter.requires_grad for parameter in model.parameters()]
    assert model.active_adapters == ["default"]
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids[None]).logits[0], default)
        model.set_adapter("other")
        torch.testing.assert_close(model(input_ids=ids[None]).logits[0], other)
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids[None]).logits[0], base)
    assert not torch.equal(default, other)
    assert not torch.equal(default, base)


class Words:
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [len(word) for word in text.split()]}


def test_samples() -> None:
    sample = sample_for(Words(), VOCABULARY, length=20)
    assert max(len(ids) for ids in (*sample.prompts, *sample.texts)) == 20
    assert all(ids[0] == 1 for ids in sample.prompts)
    given = sample_for(Words(), VOCABULARY, texts=["one two three"], prompts=[])
    assert given.prompts == ()
    assert given.texts[0].tolist() == [1, 3, 3, 5]
    assert given.description == "1 given texts"
    random = sample_for(None, VOCABULARY, length=16)
    assert random.tokens == 6 * 16
    assert int(random.texts[0].max()) < VOCABULARY
    assert "random" in random.description


def test_exact_arithmetic_leaves_every_bit() -> None:
    """A bf16 model that fastplug patched: the proof runs in fp32 and gives everything back."""
    import fastplug

    model = adapted(llama(dtype=torch.bfloat16)).train()
    applied = fastplug.apply(model)
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    ids = torch.arange(3, 20)
    found = LiveRuntime(model).logits(ids)
    assert classes == [type(module) for module in model.modules()]
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == state[name][0]
        assert torch.equal(tensor, state[name][1])
    assert hooks == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    applied.undo()
    wide = copy.deepcopy(model).float().eval()
    with torch.no_grad():
        expected = wide(input_ids=ids[None]).logits[0]
        rounded = model.eval()(input_ids=ids[None]).logits[0].float()
    assert (found - expected).abs().max() < 1e-5
    assert (rounded - expected).abs().max() > 1e-4


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return adapted(llama())


@pytest.mark.parametrize("name", ["merged_16bit", "lora"])
def test_one_flipped_byte_fails(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A disk that changes one bit after the export wrote it, the last of a mantissa."""
    import fastplug
    from fastplug.exporters import assembly

    lora = importlib.import_module("fastplug.exporters.lora")

    def flip(folder: Path, *_: Any) -> None:
        file = next(folder.glob("*.safetensors"))
        data = bytearray(file.read_bytes())
        data[-2] ^= 1
        file.write_bytes(bytes(data))

    if name == "lora":
        check = lora.read_back
        monkeypatch.setattr(lora, "read_back", lambda folder, state: (flip(folder), check(folder, state)))
    else:
        digests = assembly.check_digests
        monkeypatch.setattr(assembly, "check_digests", lambda folder, known: (flip(folder), digests(folder, known)))
    with pytest.raises(ExportError, match="does not read back as it was written"):
        fastplug.export(model, tmp_path / "out", name)
    assert not list(tmp_path.iterdir())


def test_the_base_weights_under_the_adapters_name_fail(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The complaint about other exporters: the merge wrote the base. Files and checksums are fine; the proof is not."""
    import fastplug
    from fastplug.exporters.merging import LowRank

    strong = train(copy.deepcopy(model), 0.2)
    monkeypatch.setattr(LowRank, "apply", lambda self, base, dtype: base.to(dtype))
    with pytest.raises(ProofError, match="the written file is not the live model: KL"):
        fastplug.export(strong, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    result = fastplug.export(strong, tmp_path / "out", verify=False)
    assert result.proof is None
    assert any("Not verified" in note for note in result.notes)


def test_results_and_provenance(model: Any, tmp_path: Path) -> None:
    import fastplug

    result = fastplug.export(model, tmp_path / "out")
    assert result.proof is not None
    assert result.proof.candidate.startswith("transformers ")
    assert 0 < result.proof.kl < 1e-5
    assert "random tokens" in result.proof.sample
    stored = json.loads((tmp_path / "out/fastplug.json").read_text())
    assert stored["proof"]["kl"] == result.proof.kl
    assert stored["proof"]["bound"]["kl"] == 5e-4
    assert verify_manifest(tmp_path / "out") == ()


def test_an_adapter_on_its_base_from_the_disk(tmp_path: Path) -> None:
    import transformers

    import fastplug

    llama().save_pretrained(tmp_path / "base")
    key = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
    live = adapted(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **{key: torch.bfloat16}))
    result = fastplug.export(live, tmp_path / "out", "lora")
    assert result.proof is not None
    assert result.proof.kl < 1e-9
    llama().save_pretrained(tmp_path / "base")  # another base under the same name
    live.get_base_model().lm_head.weight.data.mul_(20)
    with pytest.raises(ProofError, match="not the live model"):
        fastplug.export(live, tmp_path / "other", "lora")
