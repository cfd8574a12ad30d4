from __future__ import annotations

import copy
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

import peft
import transformers

import fastplug
from fastplug.errors import ModelError, OptionError
from fastplug.exporters import BUILTIN, ExportError
from fastplug.exporters.folder import verify_manifest
from fastplug.exporters.merged import merged_16bit
from tests.exporters.models import DTYPE, VOCABULARY, adapted, llama, logits, quantized, read, train

PEFT = tuple(map(int, peft.__version__.split(".")[:2]))
ADDED = {"fastplug.json", "SHA256SUMS"}
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def formula(base: torch.Tensor, layer: Any, *adapters: str) -> torch.Tensor:
    """``base + scale * B @ A`` as one would write it down, in fp32."""
    total = base.float()
    for name in adapters or ("default",):
        total = total + layer.scaling[name] * (layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float())
    return total.cpu()


def reload(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **{DTYPE: dtype})
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "tied", "dtype"),
    [("llama", False, torch.bfloat16), ("qwen3", True, torch.float16), ("llama", True, torch.bfloat16)],
)
def test_merge_is_the_formula_and_the_rest_is_untouched(
    tmp_path: Path, kind: str, tied: bool, dtype: torch.dtype, device: torch.device
) -> None:
    model = adapted(llama(tied, dtype, kind).to(device), use_rslora=tied)
    result = merged_16bit(model, tmp_path / "out")
    found = read(tmp_path / "out")
    base = model.get_base_model()
    for index, layer in enumerate(base.model.layers):
        for name in LINEARS:
            lora = layer.get_submodule(name)
            expected = formula(lora.base_layer.weight, lora).to(dtype).cpu()
            assert torch.equal(found.pop(f"model.layers.{index}.{name}.weight"), expected)
    assert ("lm_head.weight" in found) == (not tied)
    for name, tensor in found.items():
        stored = base.get_parameter(name).detach().cpu()
        assert stored.dtype == tensor.dtype
        assert torch.equal(stored.view(torch.uint8), tensor.view(torch.uint8))
    assert result.bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert result.format == "merged_16bit"
    assert verify_manifest(tmp_path / "out") == ()


@pytest.mark.parametrize("tied", [False, True])
def test_files_and_keys_are_those_of_peft(tmp_path: Path, tied: bool) -> None:
    model = adapted(llama(tied))
    merged_16bit(model, tmp_path / "ours", max_shard_size="20KB")
    model.merge_and_unload().save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours, theirs = ({file.name for file in (tmp_path / name).iterdir()} for name in ("ours", "theirs"))
    assert ours - ADDED == theirs
    indices = [
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("ours", "theirs")
    ]
    assert indices[0]["weight_map"] == indices[1]["weight_map"]
    assert indices[0]["metadata"].items() >= indices[1]["metadata"].items()
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    assert configs[0] == configs[1]
    a, b = read(tmp_path / "ours"), read(tmp_path / "theirs")
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2**-7, atol=1e-3)


def test_reloaded_model_gives_the_adapters_logits(tmp_path: Path) -> None:
    model = adapted(llama(dtype=torch.float32))
    setattr(model.get_base_model().config, DTYPE, torch.bfloat16)
    merged_16bit(model, tmp_path / "out")
    exact = logits(model)
    merged = logits(reload(tmp_path / "out", torch.float32))
    assert (merged - exact).abs().max() < 2**-7 * exact.abs().max()
    assert (merged - logits(model.get_base_model().eval())).abs().max() < 2**-7 * exact.abs().max()
    with model.disable_adapter():
        assert (merged - logits(model)).abs().max() > 2**-5 * exact.abs().max()


@pytest.mark.parametrize("double", [False, True])
def test_nf4_base(tmp_path: Path, double: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit

    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    model = quantized(tmp_path / "base", **options, bnb_4bit_compute_dtype=torch.float32)
    model = adapted(peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)).train()
    exact = logits(model)  # in training mode: an evaluation may repack the weights on some CPUs
    merged_16bit(model, tmp_path / "out")
    found = read(tmp_path / "out")
    lora = model.get_base_model().model.layers[1].mlp.down_proj
    decoded = dequantize_4bit(lora.base_layer.weight.data, lora.base_layer.weight.quant_state)
    assert decoded.dtype == torch.bfloat16
    assert torch.equal(found["model.layers.1.mlp.down_proj.weight"], formula(decoded, lora).bfloat16())
    original = read(tmp_path / "base")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):  # PEFT made them fp32
        assert torch.equal(found[name], original[name])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert found.keys() == original.keys()
    assert (logits(reload(tmp_path / "out", torch.float32)) - exact).abs().max() < 2**-7 * exact.abs().max()


def test_nf4_weights_repacked_for_evaluation(tmp_path: Path) -> None:
    model = adapted(quantized(tmp_path / "base")).eval()
    exact = logits(model)
    packed = [
        p for p in model.parameters() if getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False)
    ]
    before = [p.data.clone() for p in packed]
    result = merged_16bit(model, tmp_path / "out")
    assert (logits(reload(tmp_path / "out", torch.float32)) - exact).abs().max() < 2**-5 * exact.abs().max()
    assert any("repacked" in note for note in result.notes) == bool(packed)
    for parameter, data in zip(packed, before):
        assert parameter.quant_state.packing_format_for_cpu
        assert torch.equal(parameter.data, data)


def test_8bit_base(tmp_path: Path) -> None:
    model = adapted(quantized(tmp_path / "base", torch.float16, load_in_8bit=True))
    merged_16bit(model, tmp_path / "out")
    found = read(tmp_path / "out")
    lora = model.get_base_model().model.layers[0].self_attn.q_proj
    weight = lora.base_layer.weight
    scales = weight.SCB if weight.SCB is not None else lora.base_layer.state.SCB
    decoded = torch.ops.bitsandbytes.int8_vectorwise_dequant(weight.data, scales)
    assert torch.equal(found["model.layers.0.self_attn.q_proj.weight"], formula(decoded, lora).half())
    torch.testing.assert_close(
        decoded.half().cpu(), read(tmp_path / "base")["model.layers.0.self_attn.q_proj.weight"], rtol=0, atol=2e-3
    )


def test_patterns_biases_and_conv1d(tmp_path: Path) -> None:
    model = adapted(
        llama(attention_bias=True), r=4, lora_bias=True, target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 2}, alpha_pattern={"layers.1.self_attn.v_proj": 3},
    )  # fmt: skip
    merged_16bit(model, tmp_path / "out")
    found = read(tmp_path / "out")
    lora = model.get_base_model().model.layers[1].self_attn.v_proj
    assert lora.scaling["default"] == 1.5
    assert torch.equal(
        found["model.layers.1.self_attn.v_proj.weight"], formula(lora.base_layer.weight, lora).bfloat16()
    )
    bias = lora.base_layer.bias.float() + 1.5 * lora.lora_B["default"].bias.float()
    assert torch.equal(found["model.layers.1.self_attn.v_proj.bias"], bias.bfloat16())

    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=1, n_head=2))
    gpt2 = adapted(gpt2, target_modules=["c_attn"], fan_in_fan_out=True)
    merged_16bit(gpt2, tmp_path / "gpt2", dtype="bfloat16")
    lora = gpt2.get_base_model().transformer.h[0].attn.c_attn
    delta = lora.scaling["default"] * (lora.lora_B["default"].weight @ lora.lora_A["default"].weight)
    name = "transformer.h.0.attn.c_attn.weight"
    assert torch.equal(read(tmp_path / "gpt2")[name], (lora.base_layer.weight + delta.T).bfloat16())


def test_several_adapters(tmp_path: Path) -> None:
    model = adapted(llama(dtype=torch.float32))
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    train(model)
    model.base_model.set_adapter(["default", "other"])
    merged_16bit(model, tmp_path / "both")
    lora = model.get_base_model().model.layers[0].self_attn.q_proj
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = formula(lora.base_layer.weight, lora, "default", "other").bfloat16()
    assert torch.equal(read(tmp_path / "both")[name], expected)
    merged_16bit(model, tmp_path / "one", adapter="other")
    assert torch.equal(read(tmp_path / "one")[name], formula(lora.base_layer.weight, lora, "other").bfloat16())
    provenance = json.loads((tmp_path / "both/fastplug.json").read_text())
    assert provenance["scales"] == {"default": [4.0], "other": [2.0]}
    with pytest.raises(OptionError, match=r"no adapter 'third'; its adapters are 'default', 'other'"):
        merged_16bit(model, tmp_path / "none", adapter="third")


@pytest.mark.parametrize("target", [["q_proj", "v_proj"], ["embed_tokens", "down_proj"]])
def test_dora_equals_peft(tmp_path: Path, target: list[str]) -> None:
    model = adapted(llama(dtype=torch.float32), use_dora=True, target_modules=target)
    exact = logits(model)
    merged_16bit(model, tmp_path / "out", dtype="float16")
    if PEFT >= (0, 18):  # older ones merge an embedding with DoRA as if it were LoRA
        theirs = model.merge_and_unload().state_dict()
        for name, tensor in read(tmp_path / "out").items():
            torch.testing.assert_close(tensor.float(), theirs[name], rtol=2**-10, atol=1e-6)
    assert (logits(reload(tmp_path / "out", torch.float32)) - exact).abs().max() < 2**-9 * exact.abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},  # unties
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},  # unties
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 7]},
    ],
    ids=["embedding", "embedding-tied", "head", "embedding-saved-tied", "tokens"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_heads(tmp_path: Path, tied: bool, options: dict[str, Any]) -> None:
    if PEFT < (0, 19) and "ensure_weight_tying" in options and "modules_to_save" not in options:
        pytest.skip("this PEFT ties modules_to_save alone")
    model = adapted(llama(tied, torch.float32), **options)
    exact = logits(model)
    result = merged_16bit(model, tmp_path / "out", dtype="float16")
    assert model.get_base_model().config.tie_word_embeddings == tied
    unties = tied and (options.get("modules_to_save") == ["lm_head"] or "ensure_weight_tying" not in options)
    unties = unties and "trainable_token_indices" not in options
    assert any("tie_word_embeddings" in note for note in result.notes) == unties
    assert ("lm_head.weight" in read(tmp_path / "out")) == (unties or not tied)
    assert (logits(reload(tmp_path / "out", torch.float32)) - exact).abs().max() < 2**-9 * exact.abs().max()


def test_trained_token_rows_replace_the_bases(tmp_path: Path) -> None:
    model = adapted(llama(), target_modules=["q_proj"], trainable_token_indices=[1, 5])
    merged_16bit(model, tmp_path / "out")
    layer = model.get_base_model().model.embed_tokens.token_adapter
    expected = layer.base_layer.weight.detach().clone()
    expected[[1, 5]] = layer.trainable_tokens_delta["default"].detach().bfloat16()
    assert not torch.equal(expected, layer.base_layer.weight)
    assert torch.equal(read(tmp_path / "out")["model.embed_tokens.weight"], expected)


@pytest.mark.parametrize("experts", [False, True])
def test_mixture_of_experts_is_written_in_its_checkpoint_layout(tmp_path: Path, experts: bool) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj"]}
    if experts:
        options["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapted(llama(kind="qwen3_moe", dtype=torch.float32), **options)
    exact = logits(model)
    merged_16bit(model, tmp_path / "ours", dtype="float16", max_shard_size="30KB")
    model.merge_and_unload().half().save_pretrained(tmp_path / "theirs")
    ours, theirs = read(tmp_path / "ours"), read(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=2**-10, atol=1e-7)
    assert (logits(reload(tmp_path / "ours", torch.float32)) - exact).abs().max() < 2**-9 * exact.abs().max()


def test_adapters_of_transformers_itself_and_swapped_classes(tmp_path: Path) -> None:
    model = llama()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), adapter_name="mine")
    train(model)
    merged_16bit(model, tmp_path / "plain")
    for module in list(model.modules()):  # what fastplug's patches do to an instance
        cls = type(module)
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "forward": cls.forward}
        module.__class__ = type(cls.__name__, (cls,), names)
    merged_16bit(model, tmp_path / "swapped")
    lora = model.model.layers[0].mlp.down_proj
    plain, swapped = read(tmp_path / "plain"), read(tmp_path / "swapped")
    expected = formula(lora.base_layer.weight, lora, "mine").bfloat16()
    assert torch.equal(plain["model.layers.0.mlp.down_proj.weight"], expected)
    assert plain.keys() == swapped.keys()
    assert all(torch.equal(plain[name], swapped[name]) for name in plain)
    assert (tmp_path / "plain/config.json").read_text() == (tmp_path / "swapped/config.json").read_text()


def test_plain_and_compiled_models(tmp_path: Path) -> None:
    model = llama()
    merged_16bit(torch.compile(model), tmp_path / "out")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = read(tmp_path / "out"), read(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "theirs")]
    assert files[0] == files[1]


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = adapted(llama(True), target_modules=["embed_tokens", "q_proj"]).train()
    state = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    facts = {name: (p.requires_grad, p.grad, p.device, p.dtype) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    config = copy.deepcopy(model.get_base_model().config.to_dict())
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            merged_16bit(model, tmp_path / "out")
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == state[name][1]
        assert torch.equal(tensor, state[name][0])
    assert facts == {name: (p.requires_grad, p.grad, p.device, p.dtype) for name, p in model.named_parameters()}
    assert modes == [module.training for module in model.modules()]
    assert config == model.get_base_model().config.to_dict()
    lora = model.get_base_model().model.layers[0].self_attn.q_proj
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(read(tmp_path / "out")[name], formula(lora.base_layer.weight, lora).bfloat16())


def test_from_folders(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base/tokenizer.json").write_text("{}")
    (tmp_path / "base/chat_template.jinja").write_text("{{ messages }}")
    model = adapted(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **{DTYPE: "auto"}))
    model.save_pretrained(tmp_path / "adapter")
    merged_16bit(model, tmp_path / "live")
    merged_16bit(tmp_path / "base", tmp_path / "pair", adapter=tmp_path / "adapter")
    merged_16bit(str(tmp_path / "adapter"), tmp_path / "alone")
    expected = read(tmp_path / "live")
    for name in ("live", "pair", "alone"):
        found = read(tmp_path / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert (tmp_path / name / "tokenizer.json").read_text() == "{}"
        assert (tmp_path / name / "chat_template.jinja").is_file()
    assert (tmp_path / "live/generation_config.json").is_file()

    llama(hidden_size=32).save_pretrained(tmp_path / "smaller")
    shutil.copytree(tmp_path / "base", tmp_path / "shorter")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "shorter/config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    for wrong in ("smaller", "shorter"):
        with pytest.raises(ExportError, match="does not fit the base"):
            merged_16bit(tmp_path / wrong, tmp_path / "wrong", adapter=tmp_path / "adapter")
    with pytest.raises(ExportError, match=r"no config\.json"):
        merged_16bit(tmp_path, tmp_path / "wrong")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(ExportError, match="no adapter_model"):
        merged_16bit(tmp_path / "base", tmp_path / "wrong", adapter=tmp_path / "adapter")
    assert not (tmp_path / "wrong").exists()


def test_states_that_would_lose_the_adapter_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = adapted(llama())
    with model.disable_adapter(), pytest.raises(ExportError, match="are disabled"):
        merged_16bit(model, out)
    model.merge_adapter()
    with pytest.raises(ExportError, match="merged in place already"):
        merged_16bit(model, out)
    ia3 = peft.get_peft_model(llama(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ExportError, match=r"k_proj is a Linear of PEFT"):
        merged_16bit(ia3, out)
    untrained = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["k_proj"]))
    assert any("changes nothing" in note for note in merged_16bit(untrained, tmp_path / "untrained").notes)
    broken = adapted(llama())
    broken.get_base_model().model.layers[1].self_attn.q_proj.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ExportError, match=r"layers\.1\.self_attn\.q_proj\.weight has values that are not finite"):
        merged_16bit(broken, out)
    assert not out.exists()


def test_tensors_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=64, num_hidden_layers=1))
    with pytest.raises(ExportError, match=r"model\.embed_tokens\.weight is on the meta device"):
        merged_16bit(empty, out)
    model = llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        weight.data.to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(ExportError, match=r"layers\.0\.mlp\.up_proj\.weight is a Parameter of torch\.float8_e4m3fn"):
        merged_16bit(model, out)
    model = llama()
    partitioned = model.model.norm.weight
    partitioned.ds_id, partitioned.ds_status = 1, None
    with pytest.raises(ExportError, match=r"model\.norm\.weight is partitioned"):
        merged_16bit(model, out)
    model = llama()
    model.config.quantization_config = {"quant_method": "aqlm"}
    with pytest.raises(ExportError, match="quantized with aqlm"):
        merged_16bit(model, out)
    with pytest.raises(ModelError, match="not a transformers model"):
        merged_16bit(torch.nn.Linear(2, 2), out)
    with pytest.raises(OptionError, match="writes bfloat16 or float16"):
        merged_16bit(llama(), out, dtype="float32")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="max_shard_size"):
        merged_16bit(llama(), out, max_shard_size="large")
    assert not out.exists()
    assert not list(tmp_path.iterdir())


def test_dtensor_is_named(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    if dist.is_initialized():
        pytest.skip("a process group of another test is up")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = llama()
        sharded = distribute_tensor(model.lm_head.weight.detach(), init_device_mesh("cpu", (1,)))
        model.lm_head.weight = torch.nn.Parameter(sharded)
        with pytest.raises(ExportError, match=r"lm_head\.weight is sharded \(DTensor"):
            merged_16bit(model, tmp_path / "out")
    finally:
        dist.destroy_process_group()


class Tokenizer:
    """As much of a tokenizer as the exporter asks for."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("mine")


def test_tokenizer(tmp_path: Path) -> None:
    result = merged_16bit(llama(), tmp_path / "none")
    assert any("No tokenizer" in note for note in result.notes)
    result = merged_16bit(llama(), tmp_path / "given", tokenizer=Tokenizer(VOCABULARY))
    assert "tokenizer.json" in result.files
    assert not any("No tokenizer" in note for note in result.notes)
    with pytest.raises(ExportError, match="97 tokens but the embedding of LlamaForCausalLM only 96 rows"):
        merged_16bit(llama(), tmp_path / "large", tokenizer=Tokenizer(VOCABULARY + 1))
    with pytest.raises(ExportError, match="has no tokenizer"):
        merged_16bit(llama(), tmp_path / "large", tokenizer=tmp_path)
    merged_16bit(llama(), tmp_path / "folder", tokenizer=tmp_path / "given")
    assert (tmp_path / "folder/tokenizer.json").read_text() == "mine"


def test_builtin_exporters() -> None:
    assert {exporter.format for exporter in BUILTIN} >= {"merged_16bit", "merged_32bit", "lora"}
    assert all(exporter.description and callable(exporter.export) for exporter in BUILTIN)


def test_fp32_is_not_rounded(tmp_path: Path) -> None:
    model = adapted(llama())
    result = fastplug.export(model, tmp_path / "out", "merged_32bit")
    found = read(tmp_path / "out")
    lora = model.get_base_model().model.layers[1].mlp.up_proj
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], formula(lora.base_layer.weight, lora))
    assert torch.equal(found["lm_head.weight"], model.get_base_model().lm_head.weight.detach().float())
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert result.proof is not None
    assert result.proof.kl < 1e-9


def test_onto_the_original_base(tmp_path: Path) -> None:
    model = adapted(quantized(tmp_path / "base")).train()
    decoded = merged_16bit(model, tmp_path / "decoded")
    original = merged_16bit(model, tmp_path / "original", base=tmp_path / "base")
    lora = model.get_base_model().model.layers[0].self_attn.v_proj
    stored = read(tmp_path / "base")["model.layers.0.self_attn.v_proj.weight"]
    assert torch.equal(
        read(tmp_path / "original")["model.layers.0.self_attn.v_proj.weight"], formula(stored, lora).bfloat16()
    )
    assert any("14 weights from" in note and "differ by 9." in note for note in original.notes)
    assert decoded.proof is not None
    assert original.proof is not None
    assert decoded.proof.kl < original.proof.kl < 1e-2  # each printed
    assert json.loads((tmp_path / "original/fastplug.json").read_text())["merged_onto"] == "original base"

    llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "stranger")
    shutil.copytree(tmp_path / "base", tmp_path / "shorter")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "shorter/config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    llama(intermediate_size=96).save_pretrained(tmp_path / "narrower")
    for name, reason in (("stranger", r"differs by 1\d\d% from"), ("shorter", "is missing"), ("narrower", "has shape")):
        with pytest.raises(ExportError, match=rf"not the base that was quantized: .* {reason}"):
            merged_16bit(model, tmp_path / "out", base=tmp_path / name)
    assert not (tmp_path / "out").exists()
    plain = merged_16bit(adapted(llama()), tmp_path / "plain", base=tmp_path / "base")
    assert any("nothing was taken from" in note for note in plain.notes)


def test_a_folder_loaded_as_the_training_did(tmp_path: Path) -> None:
    model = adapted(quantized(tmp_path / "base")).train()
    model.save_pretrained(tmp_path / "adapter")
    merged_16bit(model, tmp_path / "live")
    merged_16bit(tmp_path / "base", tmp_path / "folder", adapter=tmp_path / "adapter", quant="nf4")
    live, found = read(tmp_path / "live"), read(tmp_path / "folder")
    assert all(torch.equal(found[name], live[name]) for name in live)
    with pytest.raises(OptionError, match="one of nf4, fp4, int8"):
        merged_16bit(tmp_path / "base", tmp_path / "out", quant="nf5")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="a live model is as it is"):
        merged_16bit(model, tmp_path / "out", quant="nf4")


@pytest.mark.parametrize("block", [(64, 32), (48, 48), None])
def test_fp8_base(tmp_path: Path, block: tuple[int, int] | None) -> None:
    """FP8 weights with a scale per block (also where blocks do not divide the weight) or tensor, as transformers holds
    them; merged, and proven against the live model with its weights decoded."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if "block_size" not in inspect.signature(fp8.FP8Linear.__init__).parameters:
        pytest.skip("this transformers has another FP8Linear")
    model = llama()
    exact = {}
    for name, parent in [
        (n, m) for n, m in model.named_modules() if type(m).__name__ in ("LlamaMLP", "LlamaAttention")
    ]:
        for key, linear in list(parent.named_children()):
            if type(linear) is not torch.nn.Linear:
                continue
            layer = fp8.FP8Linear(linear.in_features, linear.out_features, block_size=block)
            high, wide = block or linear.weight.shape
            scale = torch.rand(-(-linear.out_features // high), -(-linear.in_features // wide)) * 1e-3 + 1e-4
            codes = (torch.randn(linear.weight.shape) * 40).to(torch.float8_e4m3fn)
            layer.weight = torch.nn.Parameter(codes, requires_grad=False)
            layer.weight_scale_inv = torch.nn.Parameter(scale if block else scale.reshape(()), requires_grad=False)
            setattr(parent, key, layer)
            wide_scale = scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)
            exact[f"{name}.{key}.weight"] = codes.float() * wide_scale[: codes.shape[0], : codes.shape[1]]
    model = adapted(model, target_modules=["q_proj", "down_proj"])
    result = merged_16bit(model, tmp_path / "out", dtype="bfloat16")
    found = read(tmp_path / "out")
    assert not any("scale" in name for name in found)
    lora = model.get_base_model().model.layers[1].mlp.down_proj
    assert torch.equal(
        found["model.layers.1.mlp.down_proj.weight"],
        formula(exact["model.layers.1.mlp.down_proj.weight"], lora).bfloat16(),
    )
    assert torch.equal(
        found["model.layers.0.self_attn.k_proj.weight"], exact["model.layers.0.self_attn.k_proj.weight"].bfloat16()
    )
    assert result.proof is not None
    assert model.get_base_model().model.layers[0].self_attn.k_proj.weight.dtype == torch.float8_e4m3fn


def test_damaged_and_hostile_folders(tmp_path: Path) -> None:
    base = llama()
    for name in ("whole", "outside", "lost", "cut", "missing", "pickle"):
        base.save_pretrained(tmp_path / name, max_shard_size="60KB")
    index = tmp_path / "outside/model.safetensors.index.json"
    content = json.loads(index.read_text())
    (tmp_path / "secret.safetensors").write_bytes(b"")
    for place in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        content["weight_map"]["lm_head.weight"] = place
        index.write_text(json.dumps(content))
        with pytest.raises(ExportError, match="which lies outside of the folder"):
            merged_16bit(tmp_path / "outside", tmp_path / "out")
    shard = sorted((tmp_path / "lost").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ExportError, match=f"has no {shard.name}, which its index names"):
        merged_16bit(tmp_path / "lost", tmp_path / "out")
    shard = sorted((tmp_path / "cut").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ExportError, match="cannot be loaded"):
        merged_16bit(tmp_path / "cut", tmp_path / "out")
    config = json.loads((tmp_path / "missing/config.json").read_text())
    (tmp_path / "missing/config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ExportError, match=r"missing keys, the first is model\.layers\.2"):
        merged_16bit(tmp_path / "missing", tmp_path / "out")
    for file in (tmp_path / "pickle").glob("model*"):
        file.unlink()
    torch.save(base.state_dict(), tmp_path / "pickle/pytorch_model.bin")
    with pytest.raises((ExportError, OSError)):
        merged_16bit(tmp_path / "pickle", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_noted(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "first")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first", **{DTYPE: "auto"})
    adapted(base).save_pretrained(tmp_path / "adapter")
    (tmp_path / "first").rename(tmp_path / "second")  # what the adapter names is gone, so nothing can be compared
    result = merged_16bit(tmp_path / "second", tmp_path / "out", adapter=tmp_path / "adapter")
    assert any("was trained on" in note and "make sure they are the same" in note for note in result.notes)


def test_added_tokens_and_a_resized_vocabulary(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", pad_token="w0")
    tokenizer.add_tokens(["<think>", "</think>"])
    model = llama(tied=True, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    model = adapted(model, target_modules=["q_proj"], trainable_token_indices=[VOCABULARY, VOCABULARY + 1])
    result = merged_16bit(model, tmp_path / "out", tokenizer=tokenizer)
    assert result.proof is not None
    assert "built-in" in result.proof.sample
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("w3 <think> w4")["input_ids"] == [3, VOCABULARY, 4]
    assert read(tmp_path / "out")["model.embed_tokens.weight"].shape[0] == VOCABULARY + 2
    assert reload(tmp_path / "out").config.vocab_size == VOCABULARY + 2
