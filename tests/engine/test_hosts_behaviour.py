"""What libraries do to a model goes on working when it is patched: PEFT, hooks, checkpointing, compile, accelerate."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fastplug
from fastplug.ops.rope import reference as rope
from fastplug.patching.bind import FEW_TOKENS
from tests import models
from tests.engine.step import Step, assert_equal, assert_parity, fallbacks, patched, relative, step

Pair = tuple[Any, Any]


def pair(**options: Any) -> Pair:
    """(patched, unpatched) LoRA models with the same weights."""
    model = models.lora(models.plain("llama"), **options)
    return patched(model), model


def counted_fallbacks(model: nn.Module) -> Counter[str]:
    counts: Counter[str] = Counter()
    for reasons in fastplug.report(model).fallbacks.values():
        counts.update(reasons)
    return counts


def assert_same_step(both: Pair, reason: str | None = None) -> None:
    """Both take the same step; ``reason`` is in the report as that of a fallback, or there is none."""
    before = counted_fallbacks(both[0])
    assert_equal(step(both[0], models.batch()), step(both[1], models.batch()))
    new = counted_fallbacks(both[0]) - before
    if reason is None:
        assert not new
    else:
        assert any(reason in text for text in new), new


def assert_same_output(both: Pair) -> None:
    outputs = []
    for part in both:
        torch.manual_seed(0)
        outputs.append(part(**models.batch()))
    assert relative(outputs[0].loss.detach(), outputs[1].loss.detach()) < 1e-5
    assert relative(outputs[0].logits.detach().clone(), outputs[1].logits.detach()) < 1e-5


# --- PEFT -------------------------------------------------------------------------------------------------------------


def test_disable_adapter() -> None:
    both = pair()
    enabled = both[0](**models.batch()).loss
    contexts = [part.disable_adapter() for part in both]
    with contexts[0], contexts[1]:
        assert_same_output(both)
        assert both[0](**models.batch()).loss != enabled
    assert_same_step(both)


@pytest.mark.parametrize("quantized", [False, True])
def test_merge_and_unmerge(quantized: bool) -> None:
    model = models.qlora() if quantized else models.lora(models.plain())
    both = (patched(model), model)
    for part in both:
        part.merge_adapter()
    assert_same_output(both)
    for part in both:
        part.unmerge_adapter()
    assert_same_step(both)


@pytest.mark.parametrize("quantized", [False, True])
def test_merge_and_unload(quantized: bool) -> None:
    model = models.qlora() if quantized else models.lora(models.plain())
    both = (patched(model), model)
    merged = tuple(part.merge_and_unload() for part in both)
    assert_same_output(merged)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(merged[0].state_dict().values(), merged[1].state_dict().values()))
    fastplug.undo(merged[0])
    assert [type(module) for module in merged[0].modules()] == [type(module) for module in merged[1].modules()]


def add_adapter(model: Any, name: str, **options: Any) -> None:
    """One more adapter, with the same random values in every model."""
    import peft

    torch.manual_seed(7)
    model.add_adapter(name, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    models.randomize_adapters(model)


def test_second_adapter() -> None:
    both = pair()
    for part in both:
        add_adapter(part, "second", r=3, lora_alpha=5, target_modules=["q_proj", "gate_proj"])
        part.set_adapter("second")
    assert_same_step(both)
    for part in both:
        part.set_adapter("default")
    assert_same_step(both)
    for part in both:
        part.base_model.set_adapter(["default", "second"])
    assert_same_step(both)
    for part in both:
        part.set_adapter("default")
        part.delete_adapter("second")
    assert_same_step(both)


def test_adapter_saved_and_loaded_into_a_patched_model(tmp_path: Any) -> None:
    both = pair()
    both[1].save_pretrained(tmp_path)
    for part in both:
        part.load_adapter(tmp_path, "loaded", is_trainable=True)
        part.set_adapter("loaded")
    assert_same_step(both)


def test_mixed_batches_of_adapters() -> None:
    both = pair()
    names = ["default", "second"]
    outputs = []
    for part in both:
        add_adapter(part, "second", r=3, target_modules=["q_proj"])
        part.eval()
        outputs.append(part(**models.batch(2, 70), adapter_names=names).logits.detach().clone())
        part.train()
    assert relative(*outputs) < 1e-5
    assert_same_step(both)


UNCOVERED: dict[str, tuple[dict[str, Any], str]] = {
    "activated": ({"alora_invocation_tokens": [5]}, "the LoRA variant ALoraLinearVariant"),
}


def uncovered(kind: str) -> tuple[dict[str, Any], str]:
    import peft

    options, reason = UNCOVERED[kind]
    if not options.keys() <= peft.LoraConfig.__dataclass_fields__.keys():
        pytest.skip(f"this PEFT has no {' and '.join(options)}")
    return options, reason


@pytest.mark.parametrize("kind", UNCOVERED)
def test_uncovered_adapters_are_refused_with_a_reason(kind: str) -> None:
    options, reason = uncovered(kind)
    model = models.lora(models.plain(), target_modules=["q_proj"], **options)
    twin = patched_with_refusals(model)
    refused = fastplug.report(twin).refused
    assert {decision.role for decision in refused} == {"decoder_layer", "attention"}
    assert all("q_proj" in str(decision.reason) and reason in str(decision.reason) for decision in refused)
    assert {decision.role for decision in fastplug.report(twin).patched} == {"mlp", "lm_head_loss"}
    assert_equal(step(twin, models.batch()), step(model, models.batch()))


def test_uncovered_adapters_that_come_later_fall_back() -> None:
    both = pair()
    for part in both:
        add_adapter(part, "later", target_modules=["q_proj", "up_proj"], r=3, use_dora=True)
        part.base_model.set_adapter(["default", "later"])
    assert_same_step(both, "2 active adapters, with DoRA")
    for part in both:
        part.set_adapter("default")
    assert_same_step(both)


def test_other_tuners_are_refused_or_exact() -> None:
    import peft

    ia3 = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = peft.get_peft_model(models.plain(), ia3)
    twin = patched_with_refusals(model)
    assert {"decoder_layer", "attention", "mlp"} == {decision.role for decision in fastplug.report(twin).refused}
    assert all("peft.tuners.ia3" in str(decision.reason) for decision in fastplug.report(twin).refused)
    assert_equal(step(twin, models.batch()), step(model, models.batch()))
    tokens = models.lora(models.plain(), trainable_token_indices={"embed_tokens": [5, 9, 14]})
    assert_parity(tokens, models.batch())
    assert_parity(models.lora(models.plain(), target_modules=["q_proj", "embed_tokens"]), models.batch())


def patched_with_refusals(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    assert fastplug.apply(twin).report.refused
    return twin


# --- hooks ------------------------------------------------------------------------------------------------------------

PARTS = [
    "model.layers.1.self_attn", "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj",
    "model.layers.1.self_attn.v_proj.lora_A.default", "model.layers.1.self_attn.v_proj.base_layer",
    "model.layers.1.mlp", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.act_fn",
    "model.layers.1.mlp.up_proj.lora_dropout.default", "model.layers.1.input_layernorm",
    "model.layers.1.post_attention_layernorm", "model.layers.1", "model.norm", "model.embed_tokens", "model", "lm_head",
    "",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_every_part_are_called(kind: str) -> None:
    """As often as without fastplug, with the same step, and the fused path comes back when they go."""
    both = pair(lora_dropout=0.1)
    for name in PARTS:
        calls: Counter[int] = Counter()
        handles = []
        for i, part in enumerate(both):
            module = part.get_base_model().get_submodule(name)
            register = getattr(module, f"register_{kind}_hook")
            handles.append(register(lambda *args, i=i, calls=calls: calls.update([i])))
        assert_equal(step(both[0], models.batch()), step(both[1], models.batch()))
        assert calls[0] == calls[1], (name, calls)
        assert calls[0] or name in ("model.embed_tokens", "model", ""), name  # these have no gradient to hand on
        for handle in handles:
            handle.remove()
    count = Counter(fallbacks(both[0]))
    assert_same_step(both)
    assert Counter(fallbacks(both[0])) == count


def test_a_hook_may_change_what_passes() -> None:
    both = pair()
    for part in both:
        mlp = part.get_base_model().get_submodule("model.layers.1.mlp.up_proj")
        mlp.register_forward_hook(lambda module, args, output: output * 0.5)
        part.get_base_model().lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert_same_step(both, "up_proj has a forward hook")
    assert any("head" in reason for reason in fallbacks(both[0]))


def test_global_hooks_are_called() -> None:
    both = pair()
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
    ):
        seen: list[Counter[str]] = []
        steps = []
        for part in both:
            names: Counter[str] = Counter()
            handle = register(lambda module, *args, names=names: names.update([type(module).__name__]))
            try:
                steps.append(step(part, models.batch()))
            finally:
                handle.remove()
            seen.append(names)
        assert_equal(*steps)
        assert seen[0] == seen[1]
        assert seen[0]["SiLUActivation"] == 2 or seen[0]["SiLU"] == 2
    assert any("for all modules" in reason for reason in fallbacks(both[0]))


def test_an_instance_forward_of_a_part_is_called() -> None:
    both = pair()
    for part in both:
        linear = part.get_base_model().get_submodule("model.layers.0.mlp.down_proj")
        linear.forward = lambda x, original=linear.forward: original(x) * 1.5
    assert_same_step(both, "down_proj has a forward that was set on the instance")


def test_a_users_forward_on_a_site_is_respected() -> None:
    model = models.lora(models.plain())
    mlp = model.get_base_model().get_submodule("model.layers.0.mlp")
    mlp.forward = lambda x, original=mlp.forward: original(x) * 1.5
    expected = step(model, models.batch())
    report = fastplug.apply(model).report
    assert {(d.role, d.name.split("model.")[-1]) for d in report.refused} == {
        ("decoder_layer", "layers.0"),
        ("mlp", "layers.0.mlp"),
    }
    assert all("replaced on the instance" in str(d.reason) for d in report.refused)
    assert_equal(step(model, models.batch()), expected)


# --- checkpointing, compile -------------------------------------------------------------------------------------------


@pytest.fixture
def layer_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry whenever a fused layer rotates its queries, which it does once a forward."""
    runs: list[int] = []
    original = rope.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(rope, "forward", counting)
    return runs


@pytest.mark.parametrize("kind", ["lora", "nf4", "full"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, kind: str, layer_runs: list[int]) -> None:
    """On or off at any time, before or after apply; each layer runs twice, with the same dropout."""
    model = {
        "lora": lambda: models.lora(models.plain("qwen3"), lora_dropout=0.2),
        "nf4": lambda: models.qlora("qwen3"),
        "full": lambda: models.plain("qwen3"),
    }[kind]()
    batch = models.batch(2, FEW_TOKENS)  # the first pass of the reentrant kind has no gradients
    exact = step(model, batch, logits=False)
    twin = patched(model)
    enable(twin, reentrant)
    assert_equal(step(twin, batch, logits=False), exact)
    assert len(layer_runs) == 4
    assert_equal(step(twin, models.batch(), logits=False), step(model, models.batch(), logits=False))
    del layer_runs[:]
    twin.gradient_checkpointing_disable()  # type: ignore[operator]
    assert_equal(step(twin, batch, logits=False), exact)
    assert len(layer_runs) == 2
    enable(model, reentrant)
    later = patched(model)
    assert_equal(step(later, batch, logits=False), exact)
    assert len(layer_runs) == 6
    assert not fallbacks(twin)
    assert not fallbacks(later)
    fastplug.undo(later)
    assert_equal(step(later, batch, logits=False), exact)


def enable(model: Any, reentrant: bool) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()


@pytest.mark.slow
def test_torch_compile() -> None:
    """The same step, with no break inside the layers; the loss stands outside it for the sake of the lazy logits."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = models.lora(models.plain(num_hidden_layers=1))
    twin = patched(model)
    expected = step(model, models.batch())
    compiled: Any = torch.compile(twin, backend="aot_eager")
    for _ in range(2):
        twin.zero_grad()
        output = compiled(**models.batch())
        output.loss.backward()
        gradients = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
        assert_equal(Step(output.loss.detach(), output.logits.detach().clone(), gradients), expected)
    assert counters["stats"]["unique_graphs"] <= 2  # the layers, and the loss
    places = ("graph_break()", "_make_wrapper_subclass", "disable()`d")  # before the layers, and the logits after them
    assert all(any(place in why for place in places) for why in counters["graph_break"])
    assert not fallbacks(twin)
    torch._dynamo.reset()


# --- accelerate -------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator() -> Iterator[Callable[..., Any]]:
    import accelerate
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = (AcceleratorState, GradientState, PartialState)  # of the process: what a test before left stays
    for state in states:
        state._reset_state()
    yield lambda **options: accelerate.Accelerator(cpu=True, **options)
    for state in states:
        state._reset_state()


@pytest.mark.parametrize("first", ["apply", "prepare"])
def test_accelerator_prepare(first: str, accelerator: Callable[..., Any]) -> None:
    """Autocast's forward on the instance, put there before or after apply, and taken off again."""
    prepare = accelerator(mixed_precision="bf16")
    model = models.lora(models.plain())
    twin = models.lora(models.plain())
    if first == "apply":
        fastplug.apply(twin)
    twin, model = prepare.prepare(twin, model)
    if first == "prepare":
        fastplug.apply(twin)
    ours, theirs = step(twin, models.batch()), step(model, models.batch())
    assert ours.logits is not None
    assert ours.logits.dtype == torch.float32
    assert_equal(ours, theirs, bound=0.05)
    assert not fallbacks(twin)
    assert not fastplug.report(twin).refused
    fastplug.undo(twin)
    assert_equal(step(twin, models.batch()), theirs, bound=0)
    unwrapped = prepare.unwrap_model(twin, keep_fp32_wrapper=False)
    assert_equal(step(unwrapped, models.batch()), step(models.lora(models.plain()), models.batch()), bound=0)


@pytest.mark.parametrize("first", ["apply", "dispatch"])
def test_dispatched_models_fall_back(first: str) -> None:
    import accelerate
    from accelerate.hooks import remove_hook_from_submodules

    model, twin = models.plain(), models.plain()
    expected = step(model, models.batch())
    if first == "apply":
        fastplug.apply(twin)
    twin = accelerate.dispatch_model(twin, device_map={"": "cpu"}, force_hooks=True)
    if first == "dispatch":
        fastplug.apply(twin)
    assert_equal(step(twin, models.batch()), expected)
    remove_hook_from_submodules(twin)
    assert_equal(step(twin, models.batch()), expected)
    fastplug.undo(twin)
    assert_equal(step(twin, models.batch()), expected, bound=0)


@pytest.mark.parametrize("first", ["apply", "offload"])
def test_cpu_offload(first: str) -> None:
    """Weights that are on the meta device between calls: the patched model leaves them to accelerate."""
    import accelerate

    model, twin = models.plain().eval(), models.plain().eval()
    batch = models.batch(2, 70)
    if first == "apply":
        fastplug.apply(twin)
    accelerate.cpu_offload(twin, torch.device("cpu"))
    if first == "offload":
        with pytest.raises(fastplug.ModelError, match="meta device"):
            fastplug.apply(twin)
    with torch.no_grad():
        ours, theirs = twin(**batch), model(**batch)
    assert relative(ours.loss, theirs.loss) < 1e-6
    assert relative(ours.logits.detach().clone(), theirs.logits) < 1e-5


# --- generation, inspection -------------------------------------------------------------------------------------------

DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "beam": {"do_sample": False, "num_beams": 3},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("kind", ["lora", "nf4"])
@pytest.mark.parametrize("length", [6, 70])
def test_generation_before_during_and_after_training(length: int, kind: str) -> None:
    """Token for token, with a short prompt (original forwards) and a long one (fused prefill), padded on the left."""
    model = models.qlora("qwen3") if kind == "nf4" else models.lora(models.plain("qwen3"))
    both = (patched(model), model)
    prompt = models.batch(2, length)
    prompt.pop("labels")
    prompt["attention_mask"][1, :3] = 0

    def assert_same_tokens(part: str) -> None:
        for name, options in DECODING.items():
            made = []
            for model in both:
                model.eval()
                torch.manual_seed(3)
                made.append(model.generate(**prompt, max_new_tokens=8, eos_token_id=None, **options))
                model.train()
            assert torch.equal(made[0], made[1]), (part, name)

    assert_same_tokens("before training")
    if kind == "nf4":  # after an evaluation, bitsandbytes on a CPU with AVX512-bf16 trains no more
        return
    optimizers = [torch.optim.SGD([p for p in part.parameters() if p.requires_grad], lr=0.01) for part in both]
    for seed in range(2):
        for part, optimizer in zip(both, optimizers):
            step(part, models.batch(seed=seed))
            optimizer.step()
        assert_same_tokens("in training")
    fastplug.undo(both[0])
    assert_same_tokens("after undo")


def test_signatures_and_names_stay() -> None:
    twin, model = pair()
    for (name, mine), other in zip(twin.named_modules(), model.modules()):
        assert isinstance(mine, type(other)), name
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(type(mine), attribute) == getattr(type(other), attribute), name
        assert inspect.signature(mine.forward) == inspect.signature(other.forward), name
        assert inspect.signature(type(mine).forward) == inspect.signature(type(other).forward), name
        assert repr(mine) == repr(other)


def test_changes_to_a_patched_model() -> None:
    """Attention implementation, vocabulary, dtype and freezing may change at any time."""
    both = pair()
    for part in both:
        part.get_base_model().set_attn_implementation("eager")
    assert_same_step(both)
    for part in both:
        torch.manual_seed(0)
        part.get_base_model().resize_token_embeddings(models.VOCABULARY + 5)
    assert_same_step(both)
    for part in both:
        for parameter in part.get_base_model().model.layers[0].parameters():
            parameter.requires_grad_(False)
    assert_same_step(both)
    for part in both:
        part.double().float()
        layers = part.get_base_model().model.layers
        layers[1] = copy.deepcopy(layers[1])
    assert_same_step(both)


def test_two_losses_before_one_backward() -> None:
    """Two forward passes whose graphs live at once, as in preference training, and a retained graph."""
    both = pair(lora_dropout=0.1)
    results = []
    for part in both:
        part.zero_grad()
        torch.manual_seed(0)
        first, second = (part(**models.batch(seed=seed)).loss for seed in (1, 2))
        loss = first * 0.3 - second
        loss.backward(retain_graph=True)
        loss.backward()
        results.append([p.grad for p in part.parameters() if p.requires_grad])
    for mine, other in zip(*results):
        assert relative(mine, other) < 1e-5


def test_autograd_grad_of_some_parameters() -> None:
    both = pair()
    results = []
    for part in both:
        wanted = [p for name, p in part.named_parameters() if "layers.0.mlp" in name and "lora_B" in name]
        results.append(torch.autograd.grad(part(**models.batch()).loss, wanted))
    for mine, other in zip(*results):
        assert relative(mine, other) < 1e-5
