"""libllama from Python: find the library, quantize GGUF files with it, and run them.

    with LibLlama() as llama:
        llama.quantize(source, target, ftype=15)
        llama.load(target)
        llama.logits(ids)

The work happens in a process of its own, see ``libllama_worker``. The library itself comes from whichever package has
it: llama-cpp-python, llama-cpp-py-sync, xllamacpp (runs files, does not quantize), the npm package
``@node-llama-cpp/<platform>``, or the system.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastplug.errors import FastPlugError
from fastplug.exporters.api import ExportError

VARIABLE = "FASTPLUG_LIBLLAMA"
_NAMES = {"linux": ("libllama*.so*",), "darwin": ("libllama*.dylib",), "win32": ("llama.dll", "libllama.dll")}
# package, where in it the library lies, whether it can quantize
_PACKAGES = (("llama_cpp_py_sync", "", True), ("llama_cpp", "lib", True), ("xllamacpp", "", False))


class MissingLibLlama(FastPlugError, ImportError):
    """No usable libllama is installed."""

    def __init__(self, reason: str = "") -> None:
        system = {"Linux": "linux", "Darwin": "mac", "Windows": "win"}.get(platform.system(), "linux")
        machine = "arm64" if platform.machine().lower() in ("arm64", "aarch64") else "x64"
        metal = "-metal" if (system, machine) == ("mac", "arm64") else ""
        ImportError.__init__(
            self,
            "fastplug: no libllama that quantizes and checks GGUF files is installed; without a compiler: "
            f"npm install --prefix {sys.prefix} @node-llama-cpp/{system}-{machine}{metal} (or pip install "
            f"llama-cpp-py-sync, pip install llama-cpp-python, or name one in {VARIABLE})"
            + (f". Tried: {reason}" if reason else ""),
        )


def candidates(path: str | os.PathLike[str] | None = None, *, quantizer: bool = True) -> list[Path]:
    """Files that may be libllama, best first.

    Args:
        path: The library or its folder; default: the variable ``FASTPLUG_LIBLLAMA``, then packages, then the system.
        quantizer: Leave out builds that cannot quantize.
    """
    named = path or os.environ.get(VARIABLE)
    if named:
        return _libraries(Path(named)) if Path(named).is_dir() else [Path(named)]
    found: list[Path] = []
    for package, part, quantizes in _PACKAGES:
        if quantizes or not quantizer:
            spec = importlib.util.find_spec(package)
            for place in (spec.submodule_search_locations or ()) if spec is not None else ():
                found += _libraries(Path(place, part)) or sorted(Path(place).glob(f"{package}*.so"))
    for root in (Path.cwd(), Path(sys.prefix), Path(sys.prefix, "lib")):
        for folder in sorted(root.glob("node_modules/@node-llama-cpp/*/bins/*")):
            found += _libraries(folder)
    if system := ctypes.util.find_library("llama"):
        found.append(Path(system))
    return found


def _libraries(folder: Path) -> list[Path]:
    names = _NAMES.get(sys.platform, _NAMES["linux"])
    return [file for name in names for file in sorted(folder.glob(name)) if "common" not in file.name]


class LibLlama:
    """A process with libllama in it; a context manager.

    Args:
        path: The library or its folder, see :func:`candidates`.
        quantizer: Whether :meth:`quantize` will be called.
        threads: Threads to compute with; default: as many as torch uses.

    Raises:
        MissingLibLlama: None is installed, or none loads.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, quantizer: bool = True, threads: int | None = None
    ) -> None:
        self._threads = threads or torch.get_num_threads()
        found = candidates(path, quantizer=quantizer)
        if not found:
            raise MissingLibLlama
        self._folder = Path(tempfile.mkdtemp(prefix="fastplug-libllama-"))
        script = Path(__file__).with_name("libllama_worker.py")
        # Not "python script": that would put the exporters' folder, with its "gguf", first on the path.
        run = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
        self._log = open(self._folder / "log", "w+", encoding="utf-8", errors="replace")  # noqa: SIM115, closed below
        self._process = subprocess.Popen(
            [sys.executable, "-c", run, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
        )
        try:
            opened = self._call("open", candidates=[str(file) for file in found], quantizer=quantizer)
        except ExportError as error:
            self.close()
            raise MissingLibLlama(str(error).removeprefix("fastplug: ")) from error
        except BaseException:
            self.close()
            raise
        self.path = Path(opened["path"])
        self.name = f"libllama ({self.path.name})"
        self.vocabulary = 0

    def __enter__(self) -> LibLlama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def quantize(
        self,
        source: str | os.PathLike[str],
        target: str | os.PathLike[str],
        ftype: int,
        importance: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the GGUF file ``source`` to ``target`` in another type.

        Args:
            source: A GGUF file in F32, F16 or BF16.
            target: The file to write.
            ftype: The number of the type, ``llama_ftype`` in ``llama.h``.
            importance: For tensors by their GGUF name, the mean square of what each column is multiplied with:
                fp32 ``[columns]``.

        Raises:
            ExportError: libllama refused or died, with its own words.
        """
        file, names = None, None
        if importance:
            import numpy

            file, names = str(self._folder / "importance.npz"), list(importance)
            arrays: Any = {f"a{index}": importance[name].float().numpy() for index, name in enumerate(names)}
            numpy.savez(file, **arrays)
        self._call(
            "quantize", source=str(source), target=str(target), ftype=ftype, threads=self._threads, importance=file,
            names=names,
        )  # fmt: skip

    def load(
        self,
        path: str | os.PathLike[str],
        *,
        lora: str | os.PathLike[str] | None = None,
        length: int = 512,
        exact: bool = False,
    ) -> None:
        """Load a GGUF file (in place of the one before).

        Args:
            path: The file.
            lora: A GGUF-LoRA file to put on it, at scale 1.
            length: Longest sequence in tokens.
            exact: Keep keys and values in fp32; by default they are fp16, as in libllama's programs.

        Raises:
            ExportError: libllama cannot load it.
        """
        loaded = self._call(
            "load", path=str(path), length=length, threads=self._threads, exact=exact,
            lora=None if lora is None else str(lora),
        )  # fmt: skip
        self.vocabulary = loaded["vocabulary"]

    def logits(self, token_ids: Tensor | Sequence[int]) -> Tensor:
        """Logits at every position of one sequence: fp32 ``[length, vocabulary]``. Nothing is added to the tokens."""
        import numpy

        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)
        file = self._folder / "logits.npy"
        self._call("logits", ids=ids, file=str(file))
        return torch.from_numpy(numpy.load(file))

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids by the file's own tokenizer; ``special`` adds what it puts around a text."""
        ids: list[int] = self._call("tokenize", text=text, special=special)
        return ids

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> str:
        text: str = self._call("detokenize", ids=list(ids), special=special)
        return text

    def generate(self, ids: Sequence[int], limit: int = 64) -> str:
        """The most likely continuation, token by token, up to ``limit`` tokens or the end of the turn."""
        text: str = self._call("generate", ids=list(ids), limit=limit)["text"]
        return text

    def _call(self, name: str, **arguments: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps({"call": name, **arguments}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ExportError(f"fastplug: libllama died in {name!r}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ExportError(f"fastplug: {answer['error']}")
        return answer["result"]

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        errors = [line for line in lines if "GGML_ASSERT" in line or "Error" in line]
        return (errors or lines or [f"exit code {code}"])[-1]
