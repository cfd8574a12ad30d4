"""What README.md and docs/*.md say is run, or held against the code.

``python`` blocks run in an empty folder with these names defined, so that snippets read as in a user's script:

* ``model``: a tiny Llama with a LoRA adapter, in fp32, on the CPU; ``tokenizer`` goes with it
* ``dataset``: tokenized rows for the Trainer; ``dialogs``: a TRL dataset with a column ``text``
* ``training_args``: TrainingArguments of two steps; ``batch``: the inputs of one step, with labels

Comments in the Markdown, invisible in the rendered page, steer them: ``<!-- needs: lightning -->`` skips a block where
that package is missing, ``<!-- continues -->`` lets it see the names of the one before.

``python`` blocks that define hooks are also installed as a plugin, and a small model trains with them.

A ``python`` block that exports in another format than transformers' or PEFT's own needs programs or a network: there
the formats and options that it names must exist. So must the commands and options of ``console`` blocks, whose models
are placeholders.

``bash`` blocks: ``fastplug`` commands run, with a tiny model in the place of the one they name. Those that are not run
here, and what is checked instead, stand in ``checked_only``. ``yaml`` and ``toml`` blocks are parsed, and what is
fastplug's own in them is held against the options and the hooks.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import importlib.util
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fastplug
from fastplug.options import Options
from fastplug.run_exports import parse_exports
from tests import models

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"((?:<!--[^>]*-->\s*)*)^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!-- (needs|continues):? ?(.*?) ?-->")
MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the one that the pages' commands name


@dataclass(frozen=True)
class Snippet:
    page: Path
    line: int
    language: str
    code: str
    marks: dict[str, str]
    before: str = ""  # the code that this block continues

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks() -> list[Snippet]:
    found = []
    for page in PAGES:
        text, before = page.read_text(encoding="utf-8"), ""
        for match in BLOCK.finditer(text):
            marks = dict(COMMENT.findall(match[1]))
            line = text.count("\n", 0, match.start(3)) + 1
            before = before if "continues" in marks else ""
            found.append(Snippet(page, line, match[2], match[3], marks, before))
            before += match[3] if match[2] == "python" else ""
    return found


def snippets(language: str) -> list[Any]:
    return [pytest.param(block, id=str(block)) for block in blocks() if block.language == language]


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    for page in PAGES:
        assert len(re.findall(r"^```\w*$", page.read_text(encoding="utf-8"), re.MULTILINE)) % 2 == 0, page.name
    others = {str(block): block.language for block in blocks() if block.language not in CHECKS}
    assert not others


# --- Python -------------------------------------------------------------------------------------------------------


def names(folder: Path) -> dict[str, Any]:
    """What a snippet finds defined."""
    datasets = pytest.importorskip("datasets")
    from tests.hf import tiny

    return {
        "__name__": "__main__",
        "model": models.lora(models.plain("llama")),
        "tokenizer": tiny.tokenizer(),
        "dataset": tiny.rows(16),
        "dialogs": datasets.Dataset.from_dict({"text": ["the sky is blue because the sea is green"] * 16}),
        "training_args": tiny.arguments(folder / "out", max_steps=2),
        "batch": models.batch(),
        "torch": torch,
        "fastplug": fastplug,
    }


def exports(code: str) -> list[tuple[str, set[str]]]:
    """(format, options) of each ``fastplug.export(model, path, format, ...)`` in the code."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "fastplug.export":
            given = {keyword.arg or "": keyword.value for keyword in node.keywords}
            format = given.pop("format", node.args[2] if len(node.args) > 2 else ast.Constant("merged_16bit"))
            found.append((ast.literal_eval(format), set(given)))
    return found


def names_an_export(format: str, options: set[str]) -> None:
    from fastplug.exporting import formats, option_names

    known = formats()
    assert format.partition(":")[0] in known
    accepted = option_names(known[format.partition(":")[0]])
    assert accepted is None or options <= set(accepted), (format, options)


@pytest.mark.parametrize("snippet", snippets("python"))
def test_python(snippet: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in snippet.marks.get("needs", "").split():
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    calls = exports(snippet.code)
    if any(format.partition(":")[0] not in ("merged_16bit", "lora") for format, _ in calls):
        for format, options in calls:
            names_an_export(format, options)
        return
    monkeypatch.chdir(tmp_path)
    namespace = names(tmp_path)
    exec(compile(snippet.before, str(snippet.page), "exec"), namespace)
    code = "\n" * (snippet.line - 1) + snippet.code  # tracebacks show the page's own line numbers
    exec(compile(code, str(snippet.page), "exec"), namespace)


# --- plugins ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("snippet", [p for p in snippets("python") if "@fastplug.hookimpl" in p.values[0].code])
def test_examples_of_plugins_take_part(
    snippet: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plugin = ModuleType("plugin_of_the_page")
    exec(compile(snippet.code, str(snippet.page), "exec"), vars(plugin))
    hooks = {name for name in vars(plugin) if name.startswith("fastplug_")}
    pair = [small_model(plugin) for _ in range(2)]
    with installed(plugin):
        applied = fastplug.apply(pair[0])
        losses, gradients = zip(*(loss_and_gradients(model) for model in pair))
        check_of_hook[min(hooks)](plugin, applied)
        report = applied.report
        applied.undo()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    if "fastplug_after_apply" in hooks:
        assert capsys.readouterr().out.startswith(f"{len(report.patched)} modules are patched\n0 reasons")


def small_model(plugin: ModuleType) -> Any:
    """A LoRA model; its MLPs, without adapters, rest on the plugin's own kind of linear layer if it has one."""
    base = models.plain("llama")
    kind = getattr(plugin, "Int8Linear", None)
    for layer in base.model.layers if kind else ():
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, kind(getattr(layer.mlp, name).weight.detach()))
    return models.lora(base, target_modules=["q_proj", "v_proj"])


def loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(**models.batch()).loss
    loss.backward()
    return float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def installed(plugin: ModuleType) -> Iterator[None]:
    """Let ``plugin`` be the only installed one, by an entry point."""
    from fastplug.manager import GROUP, _manager, manager
    from fastplug.ops.table import table_for

    entry = importlib.metadata.EntryPoint("page", plugin.__name__, GROUP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, plugin.__name__, plugin)
        patch.setattr(importlib.metadata, "entry_points", lambda **_: [entry])
        for cached in (_manager, table_for):
            cached.cache_clear()
        assert [found.error for found in manager().plugins] == [None]
        yield
    for cached in (_manager, table_for):
        cached.cache_clear()


def family_takes_part(plugin: ModuleType, applied: fastplug.Applied) -> None:
    from fastplug.manager import manager

    (family,) = plugin.fastplug_families()
    assert manager().collect("fastplug_families")[-1].name == family.name


def codec_takes_part(plugin: ModuleType, applied: fastplug.Applied) -> None:
    report = applied.report
    assert not report.refused
    assert not report.fallbacks
    assert sum(decision.role == "mlp" for decision in report.patched) == 2


def op_takes_part(plugin: ModuleType, applied: fastplug.Applied) -> None:
    assert applied.report.ops["glu"] == "counted"
    assert plugin.CountedGLU.calls == 2  # one a layer


def forward_takes_part(plugin: ModuleType, applied: fastplug.Applied) -> None:
    assert {d.implementation for d in applied.report.patched if d.role == "norm"} == {"PyTorch's own"}


def exporter_takes_part(plugin: ModuleType, applied: fastplug.Applied) -> None:
    fastplug.export(applied.model, "names.txt", format="names")
    assert "lora_A" in Path("names.txt").read_text()
    with pytest.raises(FileExistsError):
        fastplug.export(applied.model, "names.txt", format="names")
    assert fastplug.export(applied.model, "names.txt", format="names", overwrite=True).files == ("names.txt",)


def choice_takes_part(plugin: ModuleType, applied: fastplug.Applied) -> None:
    (left,) = [d for d in applied.report.decisions if d.reason == "the first layer is being studied"]
    assert left.name.endswith("layers.0")
    assert left.status == "left alone"


def notice_takes_part(plugin: ModuleType, applied: fastplug.Applied) -> None:
    """What it prints is compared after the undo."""


check_of_hook: dict[str, Callable[[ModuleType, fastplug.Applied], None]] = {
    "fastplug_families": family_takes_part,
    "fastplug_codecs": codec_takes_part,
    "fastplug_ops": op_takes_part,
    "fastplug_implementations": forward_takes_part,
    "fastplug_exporters": exporter_takes_part,
    "fastplug_choose": choice_takes_part,
    "fastplug_after_apply": notice_takes_part,
}


# --- commands -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    models.plain("llama").save_pretrained(folder)
    return folder


def commands(snippet: Snippet) -> list[list[str]]:
    lines = [line for line in snippet.code.splitlines() if line.strip() and not line.startswith("#")]
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]


@pytest.mark.parametrize("snippet", snippets("bash"))
def test_commands(snippet: Snippet, request: pytest.FixtureRequest) -> None:
    for words in commands(snippet):
        check = checked_only(words)
        if check is not None:
            check(words)
        else:
            assert words[0] == "fastplug", words
            run(words[1:], request.getfixturevalue("model_folder"))


@pytest.mark.parametrize("snippet", snippets("console"))
def test_console(snippet: Snippet) -> None:
    typer = pytest.importorskip("typer")
    from fastplug.cli.app import app

    known = typer.main.get_command(app).commands
    for line in snippet.code.splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True) if line.startswith("$ ") else []
        if words[:1] != ["fastplug"]:
            continue
        options = {name for parameter in known[words[1]].params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options | {"--help"}, line
        if words[1] == "export" and "--format" in words:
            given = {words[i + 1].partition("=")[0].replace("-", "_") for i, w in enumerate(words) if w == "--option"}
            names_an_export(words[words.index("--format") + 1], given)


def run(words: list[str], folder: Path) -> None:
    """Run a ``fastplug`` command on the tiny model."""
    testing = pytest.importorskip("typer.testing")
    from fastplug.cli.app import app

    if "--quant" in words:
        pytest.importorskip("bitsandbytes")
    assert MODEL_ID in words, words
    done = testing.CliRunner().invoke(app, [str(folder) if word == MODEL_ID else word for word in words])
    assert done.exit_code == 0, done.output


def checked_only(words: list[str]) -> Callable[[list[str]], None] | None:
    """What is checked of a command that is not run here: the set-ups, which CI runs, and those that need a GPU."""
    rules: dict[tuple[str, ...], Callable[[list[str]], None]] = {
        ("pip", "install"): names_existing_extras,
        ("tox", "run"): names_an_environment,
        ("python", "-m", "benchmarks.step"): parses_as_a_benchmark,
    }
    return next((rule for prefix, rule in rules.items() if tuple(words[: len(prefix)]) == prefix), None)


def names_existing_extras(words: list[str]) -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    for word in words[2:]:
        for extra in re.findall(r"fastplug\[([\w,]+)\]", word):
            assert all(re.search(rf"^{name} = \[", declared, re.MULTILINE) for name in extra.split(",")), word


def names_an_environment(words: list[str]) -> None:
    tox = ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    environment = words[words.index("-e") + 1]
    assert environment == "test" or f"testenv:{environment}" in tox, words


def parses_as_a_benchmark(words: list[str]) -> None:
    from benchmarks.shapes import SHAPES
    from benchmarks.step import Row

    assert words[words.index("--shape") + 1] in SHAPES
    for option, value in itertools.pairwise(words):
        if option == "--row":
            assert str(Row.parse(value)) == value


# --- configuration, output ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("snippet", snippets("yaml"))
def test_yaml(snippet: Snippet) -> None:
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load(snippet.code)
    assert config
    options = config.get("fastplug") or {}
    parse_exports(options.pop("export", None))
    assert isinstance(options.pop("optimizer_in_backward", False), bool)  # Axolotl's own, as export is
    Options.of(options)


@pytest.mark.parametrize("snippet", snippets("toml"))
def test_toml(snippet: Snippet) -> None:
    from fastplug.manager import GROUP

    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML parser")
    assert GROUP in tomllib.loads(snippet.code)["project"]["entry-points"]


def test_the_report_in_the_readme_is_what_the_model_of_the_demo_gets() -> None:
    (shown,) = [block.code.strip() for block in blocks() if block.page == README and block.language == "text"]
    model = models.lora(models.plain("llama", num_hidden_layers=30, hidden_size=16, intermediate_size=16))
    assert str(fastplug.apply(model).report) == shown


# --- tables and links ---------------------------------------------------------------------------------------------


def test_the_options_table_is_complete() -> None:
    table = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert [(name, ast.literal_eval(default)) for name, default in table] == [
        (field.name, field.default) for field in fields(Options)
    ]


def test_the_families_in_the_readme_are_all() -> None:
    from fastplug.families import fastplug_families

    listed = README.read_text(encoding="utf-8").partition("<!-- families -->")[2].partition("<!-- /families -->")[0]
    letters = re.sub(r"[^a-z]", "", listed.lower())
    for family in fastplug_families():
        stem = re.sub(r"_.*|[0-9].*", "", family.name)
        assert stem in letters, family.name


def test_the_hooks_table_is_complete() -> None:
    from fastplug import hookspecs

    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    hooks = {name for name in vars(hookspecs) if name.startswith("fastplug_")}
    assert set(re.findall(r"`(fastplug_\w+)`", text.partition("\n## ")[0])) == hooks
    defined = "".join(block.code for block in blocks() if block.page.name == "extending.md")
    assert set(re.findall(r"^def (fastplug_\w+)\(", defined, re.MULTILINE)) == hooks  # each has an example


def test_the_reasons_explained_are_the_reasons_given() -> None:
    """Every quoted reason of troubleshooting.md is a text of the code; ``...`` stands for what varies."""
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| reason \|.*?(?=\n\n)", text, re.DOTALL | re.MULTILINE)
    cells = [row.split(" | ")[0] for table in tables for row in table.splitlines()[2:]]
    quoted = [quote for cell in cells for quote in re.findall(r"`(.+?)`", cell)]
    assert len(quoted) > 20
    known = texts_of_the_code()
    for quote in quoted:
        pattern = re.compile(r".*?".join(re.escape(part.strip()) for part in quote.split("...")))
        assert any(pattern.search(one) for one in known), quote


def texts_of_the_code() -> set[str]:
    """All string literals of fastplug, with ``...`` for what an f-string puts in."""
    found = set()
    for file in sorted((ROOT / "fastplug").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
                found.add("".join(map(str, parts)))
    return found


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", page.read_text(encoding="utf-8")):
            linked = page.parent / target if target else page
            assert linked.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor[1:] in anchors(linked), f"{page.name}: {target}{anchor}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


CHECKS = {"python", "bash", "console", "yaml", "toml", "text"}
