"""Whole training steps on a real GPU: no sync, the same bits, as good as the unpatched model, no slower generation."""

from __future__ import annotations

import copy
import gc
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import fastplug
from fastplug.graphs import replay
from fastplug.graphs.state import EAGER_CALLS, matrix_elements
from fastplug.patching.sites import KEY

pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.gpu

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 32000


def build(kind: str = "qlora", family: str = "Llama", layers: int = 3, width: int = 1024, seed: int = 0) -> Any:
    """A small model in bf16 on the GPU, with LoRA over bf16 or NF4 weights, B not zero."""
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 128, num_key_value_heads=max(1, width // 512), head_dim=128, dtype="bfloat16",
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).to("cuda", torch.bfloat16)
    if kind == "full":
        return model.train()
    if kind == "qlora":
        for name, module in list(model.named_modules()):
            if name.rsplit(".")[-1] in LINEARS:
                linear = bitsandbytes.nn.Linear4bit(
                    module.in_features, module.out_features, module.bias is not None, torch.bfloat16, quant_type="nf4"
                )
                linear.load_state_dict(module.state_dict())
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, linear.to("cuda"))
        model.is_loaded_in_4bit = True
        model.requires_grad_(False)
    model = get_peft_model(model, LoraConfig(r=16, target_modules=LINEARS, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def tokens(rows: int = 2, length: int = 256, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator).cuda()


def weights(model: Any) -> int:
    """Elements of the first decoder layer's matrices, as recording counts them."""
    return matrix_elements(model.get_base_model().model.layers[0])


def gradients(model: Any, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=x, labels=x if labels is None else labels).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@contextmanager
def syncs() -> Iterator[list[str]]:
    """The files from which the host waited for the GPU."""
    found: list[str] = []
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [warning.filename for warning in caught if "synchronizing CUDA operation" in str(warning.message)]


@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_step_never_waits_for_the_gpu(kind: str, graphs: str, checkpointing: bool) -> None:
    """Under gradient checkpointing transformers' mask code waits once: it looks for packed sequences, uncached."""
    model = build(kind)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    fastplug.apply(model, strict=True, graphs=graphs)
    x = tokens()
    for _ in range(4):  # compiles the kernels, records the layers
        gradients(model, x)
    with syncs() as waited:
        gradients(model, x)
    assert all("transformers/masking_utils" in name for name in waited) if checkpointing else not waited, waited
    assert not fastplug.report(model).fallbacks
    assert not fastplug.report(model).notes


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_prompts_cost_no_logits_and_no_waiting(graphs: str) -> None:
    """The number of rows that count comes to the host beside the layers, whose work is before the device meanwhile."""
    model, x = build("qlora"), tokens()
    labels = x.clone()
    labels[:, :160] = -100
    expected = gradients(model, x, labels)
    fastplug.apply(model, strict=True, graphs=graphs)
    for _ in range(4):
        gradients(model, x, labels)
    with syncs() as waited:
        found = gradients(model, x, labels)
    assert not waited, waited
    assert set(expected) == set(found)
    for name in expected:
        assert torch.nn.functional.cosine_similarity(expected[name].flatten(), found[name].flatten(), 0) > 0.99, name


def test_a_recording_that_fails_leaves_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    original = replay.KeptGraph._compute

    def waits(self: Any, x: torch.Tensor, aliases: Any) -> torch.Tensor:
        out = original(self, x, aliases)
        if torch.cuda.is_current_stream_capturing():
            out.sum().item()
        return out

    monkeypatch.setattr(replay.KeptGraph, "_compute", waits)
    model = build("lora")
    fastplug.apply(model, graphs="on")
    for _ in range(4):
        found = gradients(model, tokens())
    assert torch.isfinite(found["loss"])
    (note,) = fastplug.report(model).notes
    assert "recording" in note
    assert float(torch.nn.functional.dropout(torch.ones(1000, device="cuda"), 0.5).mean()) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_replayed_layers_give_the_same_gradients(kind: str, checkpointing: bool) -> None:
    model = build(kind)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    applied = fastplug.apply(model, graphs="off")
    x = tokens()
    eager = gradients(model, x)
    applied.undo()
    fastplug.apply(model, graphs="on")
    for _ in range(4):
        replayed = gradients(model, x)
    assert set(eager) == set(replayed)
    for name in eager:
        assert torch.nn.functional.cosine_similarity(eager[name].flatten(), replayed[name].flatten(), 0) > 0.999, name


@pytest.mark.parametrize("compute", ["fp8", "fp8_backward"])
@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_long_layers_are_replayed_in_fp8_to_the_same_bits(
    kind: str, compute: Any, checkpointing: bool, deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(kind)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    found, x = {}, tokens(2, 512)
    for graphs in ("off", "auto"):
        monkeypatch.setattr(replay, "FLOPS", 0.0 if graphs == "off" else 4 * x.numel() * weights(model) / 2)
        applied = fastplug.apply(model, compute=compute, graphs=graphs)
        for _ in range(4):
            found[graphs] = gradients(model, x)
        assert recordings(model) == (graphs == "auto" and (checkpointing or compute == "fp8"))
        applied.undo()
    assert found["off"].keys() == found["auto"].keys()
    for name, value in found["off"].items():
        assert torch.equal(value, found["auto"][name]), name


def recordings(model: Any) -> bool:
    """Whether the first decoder layer is recorded."""
    state = model.get_base_model().model.layers[0].__dict__[KEY].graphs
    return bool(state and any(state.graphs.values()))


def test_recordings_of_long_steps_give_their_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but cuBLAS's own, 64 MiB for every stream that it was used on."""
    model, x = build("lora"), tokens(4, 1024)
    monkeypatch.setattr(replay, "FLOPS", 4 * x.numel() * weights(model) / 2)
    fastplug.apply(model, compute="fp8")
    taken, scattered = [], 0
    for i in range(4):
        gradients(model, x)
        model.zero_grad(set_to_none=True)
        taken.append(torch.cuda.memory_allocated())
        if i == EAGER_CALLS - 1:  # around what stays: weights in FP8, what cuBLAS has, models of earlier tests
            gc.collect()
            torch.cuda.empty_cache()
            scattered = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    assert recordings(model)
    assert taken[3] > taken[1] + (200 << 20)  # 10 KiB a token of each layer would be 120 MiB
    with torch.no_grad():
        model(input_ids=x[:, :8], labels=x[:, :8])
    gc.collect()
    torch.cuda.empty_cache()
    assert not recordings(model)
    assert torch.cuda.memory_allocated() <= taken[1] + (100 << 20)
    assert torch.cuda.memory_reserved() <= torch.cuda.memory_allocated() + scattered + (128 << 20)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_gradients_are_as_close_to_fp32_as_the_unpatched_models(family: str, kind: str) -> None:
    result = fastplug.verify(build(kind, family, layers=2), {"input_ids": tokens(2, 128), "labels": tokens(2, 128)})
    assert result.ok, str(result)
    assert not result.dead


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_seed_gives_the_same_bits(deterministic: bool) -> None:
    model = build("qlora")
    fastplug.apply(model)
    x = tokens()
    torch.use_deterministic_algorithms(deterministic, warn_only=False)
    try:
        first, second = gradients(model, x), gradients(model, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


def train(patched: bool, seed: int, steps: int = 40) -> float:
    model = build("qlora", seed=seed)
    if patched:
        fastplug.apply(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    loss = torch.tensor(0.0)
    for i in range(steps):
        x = tokens(2, 128, seed=i % 4)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def test_training_ends_within_the_spread_of_two_unpatched_runs() -> None:
    plain, other, patched = train(False, 0), train(False, 1), train(True, 0)
    spread = abs(plain - other)
    assert abs(plain - patched) <= max(spread, 2e-3 * plain), (plain, other, patched)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_over_fp32_weights(dtype: torch.dtype) -> None:
    model = build("lora").float()
    x = tokens()

    def under_autocast() -> dict[str, torch.Tensor]:
        with torch.autocast("cuda", dtype):
            loss = model(input_ids=x, labels=x).loss
        model.zero_grad(set_to_none=True)
        (loss * 1024).backward()
        return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}

    truth, theirs = gradients(model, x), under_autocast()
    applied = fastplug.apply(model, strict=True)
    mine = under_autocast()
    assert not applied.report.fallbacks
    for name in theirs:
        scale = 1.0 if name == "loss" else 1 / 1024
        own = (theirs[name] * scale - truth[name]).norm()
        if name == "loss":  # a mean, in which the tokens' errors cancel more or less as it happens
            own += 2**-16 * truth[name].norm()
        assert (mine[name] * scale - truth[name]).norm() <= 2 * own + 1e-5 * truth[name].norm(), name


def test_peak_memory_is_lower() -> None:
    x = tokens(4, 1024)

    def peak(model: Any) -> int:
        gradients(model, x)
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        gradients(model, x)
        return torch.cuda.max_memory_allocated() - base

    model = build("qlora")
    before = peak(model)
    fastplug.apply(model)
    assert peak(model) < 0.6 * before


@pytest.mark.parametrize("sequences", [1, 8, 64])
def test_generation_is_not_slower(sequences: int) -> None:
    """Short turns, many of them, in either order: what else the machine does makes a turn longer and never shorter, so
    the fastest tenth tells."""
    model = build("qlora", layers=4).eval()
    patched = copy.deepcopy(model)
    fastplug.apply(patched)
    prompt = tokens(sequences, 32)

    def seconds(model: Any) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    times: dict[Any, list[float]] = {model: [], patched: []}
    for turn in range(120):
        for one in (model, patched) if turn % 2 else (patched, model):
            times[one].append(seconds(one))
    plain, ours = (sum(sorted(found)[1:13]) / 12 for found in times.values())
    print(sequences, f"unpatched {1e3 * plain:.2f} ms, patched {1e3 * ours:.2f} ms")
    assert ours <= plain / 0.97, times.values()


def test_torch_compile_trains_to_the_same_gradients() -> None:
    model = build("qlora", layers=2)
    x = tokens()
    plain = gradients(model, x)
    fastplug.apply(model)
    compiled = torch.compile(model)
    model.zero_grad(set_to_none=True)
    compiled(input_ids=x, labels=x).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            cosine = torch.nn.functional.cosine_similarity(parameter.grad.flatten(), plain[name].flatten(), dim=0)
            assert cosine > 0.99, (name, float(cosine))


@pytest.mark.parametrize("prompts", [True, False])
def test_trls_head_is_served_without_waiting(prompts: bool) -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("this TRL puts no such head on a model")
    model, x = build("qlora"), tokens()
    labels = x.clone()
    labels[:, : 160 if prompts else 0] = -100
    utils.add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "mean_logits", "is_top1"))

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        output = model(input_ids=x, labels=labels, fused_lm_head=True)
        output.loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"log_probs": output.log_probs, "entropy": output.entropy, "mean_logits": output.mean_logits, **found}

    expected = run()
    fastplug.apply(model, strict=True)
    for _ in range(4):
        run()
    with syncs() as waited:
        found = run()
    assert not waited, waited
    assert not fastplug.report(model).fallbacks
    assert set(expected) == set(found)
    for name in expected:
        assert torch.nn.functional.cosine_similarity(expected[name].flatten(), found[name].flatten(), 0) > 0.99, name
