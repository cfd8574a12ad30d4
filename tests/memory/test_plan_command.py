"""``fastplug plan`` and ``fastplug.plan``: what they print, and that bad input is one sentence with its numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from typer.testing import CliRunner, Result

import fastplug
from fastplug.cli import app
from fastplug.memory.plan import DECODED
from fastplug.memory.policy import Policy
from tests import models

GiB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a Llama of 1.2 billion parameters, and nothing else."""
    import transformers

    path = tmp_path_factory.mktemp("llama-1b")
    transformers.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=True, torch_dtype="bfloat16",
    ).save_pretrained(path)  # fmt: skip
    return path


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "180"}).invoke(app, ["plan", *(str(argument) for argument in arguments)])


def forecast(*arguments: object) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def error_of(*arguments: object) -> str:
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("fastplug")]
    return line


def test_it_prints_every_policy_and_the_plan(folder: Path) -> None:
    done = run(folder, "--gpu", "24GiB", "--seq", 4096, "--batch", 2, "--rank", 16, "--quant", "nf4")
    assert done.exit_code == 0, done.output
    words = ("weights", "optimizer", "activations", "logits", "workspace", "allocated", "reserve", "total", "the plan")
    for word in (*words, *(policy.value for policy in Policy), "longest context", "largest batch"):
        assert word in done.output
    assert not list(folder.glob("*.safetensors"))


def test_json_says_the_same(folder: Path) -> None:
    found = forecast(folder, "--gpu", "24GiB", "--seq", 4096, "--batch", 2, "--quant", "nf4")
    plan = found["plan"]
    assert plan["total"] == sum(plan["parts"].values()) <= 24 * GiB == plan["budget"]
    assert len(plan["policies"]) == 16
    assert set(found["uniform"]) == {
        "keep",
        "drop_gate_up",
        "keep_attention",
        "residual",
        "offload_keep",
        "offload_drop_gate_up",
        "offload_attention",
        "offload",
    }
    assert found["longest_context"] % 64 == 0
    assert found["longest_context"] > 4096
    assert found["largest_batch"] > 2
    # 16 layers of 60.8 million weights at 4.127 bits, a tied embedding of 263 million at 16
    assert plan["parts"]["weights"] == pytest.approx(16 * 60.8e6 * 4.127 / 8 + 2 * 128256 * 2048, rel=0.01)


def test_more_of_anything_needs_more(folder: Path) -> None:
    def total(*more: object) -> int:
        return int(forecast(folder, "--gpu", "400GiB", "--seq", 2048, "--policy", "keep", *more)["plan"]["total"])

    base = total("--quant", "nf4")
    assert base < total("--quant", "nf4", "--rank", 64) < total("--rank", 64)
    assert base < total("--quant", "nf4-single") < total("--quant", "int8") < total()
    assert base < total("--quant", "nf4", "--prepared")
    assert base < total("--quant", "nf4", "--accumulation", 4)
    assert base < total("--quant", "nf4", "--batch", 2)
    full = total("--rank", 0)
    assert full > total("--rank", 0, "--optimizer", "adamw_8bit") > total("--rank", 0, "--optimizer", "sgd")


def test_what_is_left_is_spent_on_decoded_weights(folder: Path) -> None:
    def parts(*arguments: object) -> dict[str, int]:
        return dict(forecast(folder, *arguments)["plan"]["parts"])

    long = ("--seq", 4096, "--batch", 8)
    found = forecast(folder, *long, "--quant", "nf4", "--gpu", "80GiB")
    plan, keep = found["plan"], found["uniform"]["keep"]
    assert plan["parts"][DECODED] == 16 * 2 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192)
    assert DECODED not in keep["parts"]
    assert plan["total"] - keep["total"] == pytest.approx(plan["parts"][DECODED], rel=0.1)
    assert plan["ms"] < keep["ms"]
    assert 0 < parts(*long, "--quant", "nf4", "--gpu", "30GiB")[DECODED] < plan["parts"][DECODED]
    assert DECODED not in parts(*long, "--gpu", "80GiB")  # nothing to decode
    assert DECODED not in parts("--quant", "nf4", "--gpu", "80GiB")  # so short a step is recorded, and decodes


def test_policies_can_be_left_out(folder: Path) -> None:
    found = forecast(folder, "--gpu", "10GiB", "--seq", 8192, "--batch", 2, "--policy", "keep", "--policy", "residual")
    assert set(found["plan"]["policies"]) <= {"keep", "residual"}
    assert set(found["uniform"]) == {"keep", "residual"}


def test_headroom_and_host_memory_are_limits(folder: Path) -> None:
    given = ("--gpu", "6GiB", "--seq", 8192, "--batch", 2, "--quant", "nf4")
    free = forecast(folder, *given)["plan"]
    less = forecast(folder, *given, "--headroom", "2GiB")["plan"]
    assert less["total"] <= less["budget"] == free["budget"] - 2 * GiB
    assert less["ms"] > free["ms"]
    assert less["host_bytes"] > 0
    limited = forecast(folder, *given, "--headroom", "2GiB", "--host-memory", "512MiB")["plan"]
    assert limited["host_bytes"] <= 512 * 2**20


def test_both_numbers_are_there_and_said_to_be_what_they_are(folder: Path) -> None:
    """What tensors take, and what a budget means: reserved memory and the CUDA context."""
    given = ("--gpu", "24GiB", "--seq", 4096, "--quant", "nf4")
    plan = forecast(folder, *given)["plan"]
    outside = plan["parts"]["slack"] + plan["parts"]["context"]
    assert plan["total"] == plan["allocated"] + outside
    assert plan["parts"]["slack"] == pytest.approx(0.05 * plan["allocated"], abs=1)
    assert plan["parts"]["context"] == 840 * 2**20
    text = run(folder, *given).output
    assert "torch.cuda.max_memory_allocated" in text
    assert "5% of that, and 0.82 GiB of CUDA context" in text
    assert "reserved memory and the CUDA context" in text
    (row,) = [line for line in text.splitlines() if line.strip().startswith("the plan  ") and "," in line][:1]
    assert f"{plan['allocated'] / GiB:.2f}" in row
    assert f"{plan['total'] / GiB:.2f}" in row


def test_a_named_gpu_has_no_more_than_it_has(folder: Path) -> None:
    given = ("--seq", 65536, "--quant", "nf4", "--policy", "keep", "--policy", "residual")
    for name, most in ((None, 79.1), ("H100", 79.1), ("RTX 4090", 23.5)):
        found = forecast(folder, *given, *(() if name is None else ("--gpu", name)))
        assert found["plan"]["total"] <= found["plan"]["budget"] == int(most * GiB)
        assert "all that CUDA reports" in found["assumed"]["budget"]
        assert "guessed" not in found["assumed"]["times"]
    found = forecast(folder, *given, "--gpu", "80GiB")
    assert found["plan"]["budget"] == 80 * GiB
    assert "CUDA reports 79.10 GiB of one H100" in found["assumed"]["budget"]
    assert "79.18 GiB without the CUDA context" in found["assumed"]["budget"]
    assert found["assumed"]["times"].startswith("guessed, as of one H100")
    found = forecast(folder, "--policy", "keep", "--gpu", "T4", "--headroom", "1GiB")
    assert found["assumed"]["budget"].startswith(
        "13.50 GiB: 14.50 GiB, all that CUDA reports of one T4, less 1.00 GiB of"
    )


def test_times_are_said_to_be_without_python(folder: Path) -> None:
    short, long = (
        forecast(folder, "--gpu", "L4", "--policy", "residual", "--seq", length)["assumed"]["times"]
        for length in (512, 32768)
    )
    assert long == "as of one L4; the GPU is taken to never wait for Python"
    assert short.startswith(long + ",")
    assert "CUDA graphs" in short


def test_host_memory_is_assumed_or_limited(folder: Path) -> None:
    given = ("--gpu", "6GiB", "--seq", 8192, "--batch", 2, "--quant", "nf4")
    assert "as much as it takes; --host-memory limits it" in run(folder, *given).output
    text = run(folder, *given, "--host-memory", "2GiB").output
    assert "2.00 GiB at most" in text
    (row,) = [line for line in text.splitlines() if line.strip().startswith("offload_keep ")]
    assert "!" in row  # more host memory than there is


def test_the_models_own_limit_is_said(folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values.pop("rope_parameters", None)
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    values |= {"max_position_embeddings": 2048, "rope_theta": 1e4}
    values["rope_scaling"] = {**rope, "original_max_position_embeddings": 256}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    given = ("--gpu", "L4", "--policy", "residual")
    text = run(tmp_path, *given).output
    assert "the model's config is for 2,048 (rope scaling: llama3, from 256)" in text
    assert "more than 2,048 tokens may fit the memory, but not the model" in text
    found = forecast(tmp_path, *given)
    assert found["positions"] == 2048 < found["longest_context"]
    found = forecast(folder, "--gpu", "5GiB", "--quant", "nf4", "--policy", "keep")
    assert found["assumed"]["positions"] == "131,072"
    assert not found["notes"]


def test_help_lists_the_policies() -> None:
    text = run("--help").output
    for policy in Policy:
        assert policy.value in text


def test_a_picture_is_drawn(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run(folder, "--gpu", "24GiB", "--picture", tmp_path / "plan.png")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_an_adapter_says_its_rank_and_places(tmp_path: Path) -> None:
    model = models.lora(models.plain("llama"), r=8, target_modules=["q_proj", "v_proj"])
    model.save_pretrained(tmp_path / "adapter")
    model.get_base_model().config.save_pretrained(tmp_path / "model")
    found = forecast(tmp_path / "model", "--adapter", tmp_path / "adapter", "--gpu", "4GiB", "--seq", 64)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert found["plan"]["parts"]["adapters"] == sum(p.numel() * 4 for p in trained)


def test_models_stored_quantized_are_counted_so(folder: Path, tmp_path: Path) -> None:
    def weights(**stored: Any) -> int:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": stored}), encoding="utf-8")
        return int(forecast(tmp_path, "--gpu", "80GiB")["plan"]["parts"]["weights"])

    nf4 = int(forecast(folder, "--gpu", "80GiB", "--quant", "nf4")["plan"]["parts"]["weights"])
    bnb = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert weights(**bnb, bnb_4bit_use_double_quant=True) == nf4 < weights(**bnb)
    assert weights(quant_method="awq", bits=4) > nf4
    assert "whose bytes fastplug cannot count" in _unknown(folder, tmp_path)


def _unknown(folder: Path, tmp_path: Path) -> str:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values["quantization_config"] = {"quant_method": "spqr", "bits": 3}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return error_of(tmp_path)


# --- in Python --------------------------------------------------------------------------------------------------------


def test_a_model_in_hand_is_read_and_left_alone() -> None:
    model = models.lora(models.plain("qwen3"))
    before = {name: (p.dtype, p.requires_grad, id(type(p))) for name, p in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    found = fastplug.plan(model, gpu="4GiB", sequence=64, batch=2, prepared=True)
    assert {name: (p.dtype, p.requires_grad, id(type(p))) for name, p in model.named_parameters()} == before
    assert [type(module) for module in model.modules()] == classes
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert found.plan.parts["weights"] + found.plan.parts["adapters"] == pytest.approx(weights, rel=0.01)
    assert isinstance(found, fastplug.Forecast)
    assert isinstance(found.plan, fastplug.Plan)
    assert fastplug.Plan.from_json(found.plan.to_json()) == found.plan


def test_nothing_is_allocated_for_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is built, is built on the meta device."""
    built: list[Any] = []
    real = fastplug.memory.shapes.ModelShape.of_model.__func__  # type: ignore[attr-defined]

    def of_model(cls: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        built.append(model)
        return real(cls, model, *args, **kwargs)

    monkeypatch.setattr(fastplug.memory.shapes.ModelShape, "of_model", classmethod(of_model))
    fastplug.plan(folder, gpu="24GiB", quant="nf4")
    (model,) = built
    assert all(p.device == torch.device("meta") for p in model.parameters())


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_budget_below_the_weights_is_said_in_numbers(folder: Path) -> None:
    text = error_of(folder, "--gpu", "2GiB")
    assert "a budget of 2.00 GiB is too small: what is there before the first step" in text
    assert "weights 2.30 GiB" in text


def test_what_would_fit_is_said(folder: Path) -> None:
    text = error_of(folder, "--gpu", "4GiB", "--seq", 131072, "--batch", 8, "--quant", "nf4")
    assert "the least that a step needs is" in text
    assert "what fits is 8 x " in text


def test_too_little_host_memory_is_named(folder: Path) -> None:
    given = (folder, "--gpu", "5GiB", "--seq", 32768, "--quant", "nf4")
    assert forecast(*given)["plan"]["host_bytes"] > GiB
    text = error_of(*given, "--host-memory", "256MiB")
    assert "0.25 GiB of host memory is too little: for 1 x 32768 tokens to fit 5.00 GiB of the GPU" in text
    assert "give more host memory" in text
    found = re.search(r"keep ([\d.]+) (GiB|MiB) in the host's memory; with 0.25 GiB the GPU needs ([\d.]+) GiB", text)
    assert found is not None
    assert float(found[3]) > 5
    wanted = round(float(found[1]) * (1024 if found[2] == "GiB" else 1) / 16) * 16  # in pieces
    assert forecast(*given, "--host-memory", f"{wanted}MiB")["plan"]["host_bytes"] <= wanted * 2**20
    assert "host memory is too little" in error_of(*given, "--host-memory", f"{wanted - 16}MiB")
    # where no host memory would do, the GPU's is what lacks
    assert "a budget of 2.00 GiB is too small" in error_of(folder, "--gpu", "2GiB", "--host-memory", "1GiB")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpu", "24"], "24GiB if you mean that"),
        (["--gpu", "Voodoo"], "RTX 4090"),
        (["--quant", "nf5"], "nf4, fp4"),
        (["--optimizer", "adam"], "adamw_8bit"),
        (["--policy", "everything"], "keep_attention"),
        (["--dtype", "float8"], "bfloat16"),
        (["--residual-dtype", "int8"], "bfloat16"),
        (["--headroom", "much"], "2GiB"),
        (["--headroom", "200GiB"], "headroom"),
        (["--host-memory", "0.5"], "64GiB"),
    ],
)
def test_bad_values_are_refused_in_a_sentence(folder: Path, arguments: list[str], expected: str) -> None:
    assert expected in error_of(folder, *arguments)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in error_of(tmp_path)
    assert "no/such-model" in error_of("no/such-model")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}', encoding="utf-8")
    assert "not a causal language model" in error_of(tmp_path)
    with pytest.raises(fastplug.ModelError, match="decoder layers"):
        fastplug.plan(torch.nn.Linear(2, 2))
