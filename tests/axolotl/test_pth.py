"""The start-up file: what it costs, what it changes and what it leaves, in environments with a stand-in for Axolotl."""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import textwrap
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PTH = "fastplug_axolotl.pth"
OFF = {"FASTPLUG_AXOLOTL_PTH": "0"}

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("hatchling", "editables", "pip"))),
    reason="builds and installs fastplug: needs pip, hatchling and editables",
)

# As much of axolotl.integrations.base as matters here: the name is split at its last dot, ImportErrors are swallowed.
BASE = """
import importlib

class BasePlugin:
    def __init__(self): ...
    def register(self, cfg): ...
    def get_input_args(self): ...
    def add_callbacks_pre_trainer(self, cfg, model): return []
    def post_trainer_create(self, cfg, trainer): ...

def load_plugin(plugin_name):
    module_name, class_name = plugin_name.rsplit(".", 1)
    return getattr(importlib.import_module(module_name), class_name)()

class PluginManager:
    plugins = {}
    @classmethod
    def get_instance(cls): return cls()
    def register(self, plugin_name):
        try:
            self.plugins[plugin_name] = load_plugin(plugin_name)
        except ImportError as error:
            print("swallowed", error)
"""
LOAD = """
import sys
from axolotl.integrations.base import PluginManager
manager = PluginManager.get_instance()
for name in sys.argv[1:]:
    manager.register(name)
    print(type(manager.plugins[name]).__name__)
"""
FINDERS = "import sys; print([finder for finder in sys.meta_path if 'FastPlug' in repr(finder)])"


Done = subprocess.CompletedProcess[str]


class Environment:
    """A virtual environment without pip that holds the stand-in for Axolotl."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        self.python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        self.site = Path(self.run("import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
        package = self.site / "axolotl" / "integrations"
        package.mkdir(parents=True)
        for name in (package.parent / "__init__.py", package / "__init__.py"):
            name.write_text("")
        self.base = package / "base.py"
        self.base.write_text(BASE)

    def run(
        self, code: str, *arguments: str, options: Sequence[str] = (), fails: bool = False, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", *OFF)}
        done = subprocess.run(
            [self.python, *options, "-c", textwrap.dedent(code), *arguments],
            capture_output=True,
            text=True,
            env=kept | variables,
        )
        assert (done.returncode != 0) is fails, done.stdout + done.stderr
        return done

    def pip(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check", "--quiet"]
        subprocess.run([*command, *arguments], check=True)

    def entry_point(self, name: str, value: str) -> None:
        """Let a package called after ``value`` register a plugin."""
        info = self.site / f"{value.split(':')[0]}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {value.split(':')[0]}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[axolotl.plugins]\n{name} = {value}\n")


def build(kind: str, project: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    code = f"import hatchling.build as b; print(b.build_{kind}({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, check=True, capture_output=True, text=True)
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is installed, so that the editable install may lose its folder."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("fastplug", "fastplug_hf", "fastplug_lightning", "fastplug_axolotl"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def builder(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Environment]:
    """Makes an environment with fastplug installed as a ``wheel`` or ``editable``."""

    def make(kind: str) -> Environment:
        made = Environment(tmp_path_factory.mktemp("environment"))
        made.pip("install", "--no-deps", "--no-index", str(build(kind, project, tmp_path_factory.mktemp("dist"))))
        return made

    return make


@pytest.fixture(scope="module")
def wheel(builder: Callable[[str], Environment]) -> Environment:
    return builder("wheel")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("bare"))


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_install_and_uninstall(builder: Callable[[str], Environment], kind: str) -> None:
    made = builder(kind)
    assert made.run(LOAD, "fastplug", "fastplug_axolotl.FastPlugPlugin").stdout.split() == ["FastPlugPlugin"] * 2
    made.pip("uninstall", "--yes", "fastplug")
    assert not [path.name for path in made.site.iterdir() if "fastplug" in path.name]
    assert made.run(FINDERS).stdout == "[]\n"
    assert "ValueError" in made.run(LOAD, "fastplug", fails=True).stderr


def test_editable_install_whose_folder_is_gone_disturbs_nobody(
    project: Path, builder: Callable[[str], Environment]
) -> None:
    made = builder("editable")
    moved = project.rename(project.with_name("moved"))
    try:
        done = made.run("import axolotl.integrations.base as base; print(base.load_plugin.__module__)")
        assert (done.stdout, done.stderr) == ("axolotl.integrations.base\n", "")
    finally:
        moved.rename(project)


def test_turned_off_by_the_environment(wheel: Environment) -> None:
    assert "FastPlugStartup" in wheel.run(FINDERS).stdout
    assert wheel.run(FINDERS, **OFF).stdout == "[]\n"
    assert "not enough values to unpack" in wheel.run(LOAD, "fastplug", fails=True, **OFF).stderr
    assert wheel.run(LOAD, "fastplug_axolotl.FastPlugPlugin", **OFF).stdout == "FastPlugPlugin\n"


def test_start_of_the_interpreter_imports_nothing_more(wheel: Environment, bare: Environment) -> None:
    modules = "import sys; print(sorted(sys.modules))"
    assert wheel.run(modules).stdout == bare.run(modules).stdout


def test_start_of_the_interpreter_costs_under_a_millisecond(wheel: Environment) -> None:
    """Processor time of what `site` does with the file, twice as in a venv, in new processes.

    A start with the file and one without are some thirty times as long as that, so their difference is mostly noise on
    a busy machine. That nothing else differs between the two, the test above shows.
    """
    code = """
        import site, sys, time
        assert not any("FastPlug" in repr(finder) for finder in sys.meta_path)
        begin = time.process_time()
        for _ in range(2):
            site.addpackage(sys.argv[1], sys.argv[2], set())
        print(begin, time.process_time() - begin, sum("FastPlug" in repr(finder) for finder in sys.meta_path))
    """
    starts, seconds = [], []
    for _ in range(25):
        start, took, finders = wheel.run(code, str(wheel.site), PTH, options=["-S"]).stdout.split()
        assert finders == "1"
        starts.append(float(start))
        seconds.append(float(took))
    more, start_without = statistics.median(seconds), statistics.median(starts)
    assert more < 1e-3
    assert more < 0.1 * start_without


def test_line_itself_runs_in_a_fraction_of_that(wheel: Environment) -> None:
    line = (wheel.site / PTH).read_text().splitlines()[-1]
    code = """
        import sys, time
        line, best = sys.argv[1], 1.0
        for _ in range(50):
            begin = time.perf_counter()
            exec(line)
            best = min(best, time.perf_counter() - begin)
        print(best)
    """
    assert float(wheel.run(code, line).stdout) < 5e-4


def test_hook_goes_once_it_has_served(wheel: Environment) -> None:
    done = wheel.run("""
        import sys
        import axolotl
        before = len(sys.meta_path)
        import axolotl.integrations.base as base
        print(before - len(sys.meta_path), "exec_module" in vars(base.__spec__.loader), base.load_plugin.__name__)
    """)
    assert done.stdout == "1 False load_plugin\n"


def test_hook_survives_a_look_and_a_failed_import(wheel: Environment) -> None:
    done = wheel.run("""
        import importlib.util, pathlib, sys
        spec = importlib.util.find_spec("axolotl.integrations.base")  # transformers looks for packages like this
        path = pathlib.Path(spec.origin)
        text = path.read_text()
        try:
            path.write_text("raise RuntimeError('a missing dependency')")
            try:
                import axolotl.integrations.base
            except RuntimeError as error:
                print(error)
        finally:
            path.write_text(text + "# and a byte more, so that no cached bytecode matches")
        import axolotl.integrations.base as base
        print(type(base.load_plugin("fastplug")).__name__)
    """)
    assert done.stdout == "a missing dependency\nFastPlugPlugin\n"


def test_two_files_wrap_once(wheel: Environment) -> None:
    """As in an environment over a system with fastplug; and the site module runs a venv's .pth files twice."""
    line = (wheel.site / PTH).read_text().splitlines()[-1]
    assert wheel.run(FINDERS).stdout.count("FastPlugStartup") == 1
    done = wheel.run(
        """
        import sys
        exec(sys.argv[1])
        sys.meta_path.insert(0, sys.meta_path[0])
        import axolotl.integrations.base as base
        print(hasattr(base.load_plugin.__wrapped__, "__wrapped__"), type(base.load_plugin("fastplug")).__name__)
        print([finder for finder in sys.meta_path if "FastPlug" in repr(finder)])
        """,
        line,
    )
    assert done.stdout == "False FastPlugPlugin\n[]\n"


def test_names(builder: Callable[[str], Environment]) -> None:
    made = builder("wheel")
    (made.site / "other_plugin.py").write_text("class Other: ...")
    made.entry_point("other", "other_plugin:Other")
    assert made.run(LOAD, "other", "other_plugin.Other", "fastplug").stdout.split() == [
        "Other",
        "Other",
        "FastPlugPlugin",
    ]

    typo = made.run(LOAD, "fastplugg", fails=True).stderr
    assert "plugins: 'fastplugg' has no dot" in typo
    assert "did you mean 'fastplug'?" in typo
    assert "those that do: fastplug, other" in made.run(LOAD, "xyz", fails=True).stderr

    made.entry_point("broken", "no_such_module:Plugin")
    broken = made.run(LOAD, "broken", fails=True)
    assert "RuntimeError: plugins: broken (no_such_module.Plugin) cannot be imported" in broken.stderr
    assert "swallowed" in made.run(LOAD + "\n", "no_such_module.Plugin", fails=True).stdout, "Axolotl's own way changed"

    made.entry_point("other", "second_plugin:Other")
    twice = made.run(LOAD, "other", fails=True).stderr
    assert "the name 'other' is claimed by other_plugin.Other and second_plugin.Other" in twice


REGISTER = """
from axolotl.integrations.base import PluginManager
PluginManager.get_instance().register("{0}")
for plugin in PluginManager.plugins.values():
    plugin.register({{"plugins": ["{0}"]}})
"""


@pytest.mark.parametrize("name", ["fastplug", "fastplug_axolotl.FastPlugPlugin"])
def test_what_is_missing_is_raised_and_not_swallowed(wheel: Environment, name: str) -> None:
    """In these environments there is no torch and no transformers."""
    failed = wheel.run(REGISTER.format(name), fails=True)
    assert "FastPlugError: fastplug: `plugins:` asks for fastplug, which cannot be loaded" in failed.stderr
    assert "swallowed" not in failed.stdout


@pytest.mark.parametrize("name", ["fastplug", "fastplug_axolotl.FastPlugPlugin"])
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("class BasePlugin:", "class Plugin:", "needs Axolotl 0.13 or later"),
        ("def post_trainer_create", "def after_trainer", "has no plugin hook post_trainer_create"),
    ],
)
def test_axolotl_too_old_or_too_new(
    builder: Callable[[str], Environment], name: str, old: str, new: str, message: str
) -> None:
    made = builder("wheel")
    made.base.write_text(BASE.replace(old, new))
    failed = made.run(REGISTER.format(name), fails=True)
    assert message in failed.stderr.splitlines()[-1]
    assert "swallowed" not in failed.stdout


def test_axolotl_without_load_plugin_is_left_alone(builder: Callable[[str], Environment]) -> None:
    made = builder("wheel")
    made.base.write_text("x = 1")
    assert made.run("import axolotl.integrations.base as base; print(base.x)").stdout == "1\n"


def test_package_names_its_plugin() -> None:
    import fastplug_axolotl

    with pytest.raises(AttributeError, match="its plugin is FastPlugPlugin"):
        fastplug_axolotl.FastPlugin  # noqa: B018
