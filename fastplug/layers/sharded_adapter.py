"""An adapter out of a training checkpoint: sharded (``torch.distributed.checkpoint``) or one file, to PEFT's layout.

FSDP writes a checkpoint as a folder of ``.distcp`` files, a few for each process, beside a ``.metadata`` file that says
which tensor lies where; or as one file with the full state. In both, the adapter's tensors lie among those of the base,
under the names of a training process: with the adapter's name inside, behind the prefixes of wrappers.
"""

from __future__ import annotations

import collections
import os
import pathlib
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from fastplug.errors import ModelError

_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_OPTIMIZER = re.compile(r"(^|\.)(optim|optimizer|optimizer_states?|exp_avg|exp_avg_sq)(\.|$)")
ROOT = "base_model.model."
_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def adapter_tensors(source: Path, adapter: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of an adapter in a training checkpoint, under the names of PEFT's files.

    Args:
        source: A folder with ``.metadata`` (or with one such folder in it), or a file that ``torch.save`` or
            safetensors wrote.
        adapter: The adapter's name, needed where there are several.

    Raises:
        ModelError: No checkpoint, no adapter in it, or several.
    """
    sharded = _sharded_folder(source)
    if sharded is not None:
        metadata = _Metadata(sharded)
        names = {key: peft_name(key) for key in metadata.tensors}
        chosen = _chosen(names, adapter, source)
        return {chosen[key]: tensor for key, tensor in metadata.read(list(chosen)).items()}
    state = _file(source)
    chosen = _chosen({key: peft_name(key) for key in state}, adapter, source)
    return {name: state[key].detach().clone().contiguous() for key, name in chosen.items()}


def peft_name(key: str) -> tuple[str, str | None] | None:
    """(name in PEFT's files, adapter it belongs to) of a tensor in a checkpoint, None for one of the base."""
    if _OPTIMIZER.search(key):
        return None
    key = _WRAPPERS.sub("", key)
    key = ROOT + key.partition(ROOT)[2] if ROOT in key else key
    if ".modules_to_save." in key:
        before, _, after = key.partition(".modules_to_save.")
        owner, _, inner = after.partition(".")
        return _rooted(f"{before}.{inner}"), owner
    parts = key.split(".")
    place = next((i for i, part in enumerate(parts) if part in _PARTS), None)
    if place is None:
        return None
    rest = parts[place + 1 :]
    adapter: str | None = None
    if rest and rest[0] not in ("weight", "bias"):
        adapter, rest = rest[0], rest[1:]
    if parts[place] == "lora_magnitude_vector":
        rest = []
    return _rooted(".".join((*parts[: place + 1], *rest))), adapter


def _rooted(name: str) -> str:
    if name.startswith(ROOT):
        return name
    for prefix in ("state_dict.", "module.", "model.base_model.", "app."):
        name = name.removeprefix(prefix)
    return ROOT + name


def _chosen(names: dict[str, tuple[str, str | None] | None], adapter: str | None, source: Path) -> dict[str, str]:
    """Checkpoint key -> PEFT's name, of one adapter."""
    found = {key: name for key, name in names.items() if name is not None}
    adapters = {name[1] for name in found.values() if name[1] is not None}
    if not found:
        raise ModelError(f"fastplug: {source} holds no tensors of a LoRA adapter")
    if adapter is None and len(adapters) > 1:
        raise ModelError(f"fastplug: {source} holds the adapters {', '.join(sorted(adapters))}; name one (--name)")
    if adapter is not None and adapters and adapter not in adapters:
        raise ModelError(f"fastplug: {source} holds no adapter {adapter!r}, but {', '.join(sorted(adapters))}")
    chosen = {key: name for key, (name, owner) in found.items() if adapter is None or owner in (adapter, None)}
    if len(set(chosen.values())) < len(chosen):
        raise ModelError(f"fastplug: {source} holds tensors of the adapter more than once, under several prefixes")
    return chosen


def _sharded_folder(source: Path) -> Path | None:
    if not source.is_dir():
        return None
    if (source / ".metadata").is_file():
        return source
    inner = [folder for folder in sorted(source.iterdir()) if (folder / ".metadata").is_file()]
    inner = [folder for folder in inner if "optim" not in folder.name]
    if len(inner) > 1:
        raise ModelError(f"fastplug: {source} holds several checkpoints: {', '.join(f.name for f in inner)}; name one")
    return inner[0] if inner else None


def _file(source: Path) -> dict[str, torch.Tensor]:
    if source.is_dir():
        known = ("pytorch_model_fsdp.bin", "adapter_model.safetensors", "model.safetensors", "pytorch_model.bin")
        file = next((source / name for name in known if (source / name).is_file()), None)
        if file is None:
            raise ModelError(f"fastplug: {source} is no checkpoint: it has neither .metadata nor {', '.join(known)}")
        source = file
    if not source.is_file():
        raise ModelError(f"fastplug: there is no checkpoint {source}")
    try:
        if source.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(source)
        state: Any = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, pickle.UnpicklingError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"fastplug: {source} cannot be read as a checkpoint of tensors alone: {reason}") from error
    for key in ("state_dict", "model", "module"):  # Lightning's, accelerate's, DeepSpeed's
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ModelError(f"fastplug: {source} holds a {type(state).__name__}, not tensors by name")
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


class _Metadata:
    """A sharded checkpoint, its metadata read without running what a pickle may name."""

    def __init__(self, folder: Path) -> None:
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.folder = folder
        self._metadata = _unpickled(folder / ".metadata")
        entries = getattr(self._metadata, "state_dict_metadata", {})
        self.tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    def read(self, keys: list[str]) -> dict[str, torch.Tensor]:
        """The whole tensors of these names, put together from their shards."""
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        class Reader(FileSystemReader):
            def read_metadata(inner, *args: Any, **kwargs: Any) -> Any:
                storage = getattr(self._metadata, "storage_meta", None)
                if storage is not None:
                    storage.load_id = inner.load_id
                return self._metadata

        state = {key: torch.empty(self.tensors[key].size, dtype=self.tensors[key].properties.dtype) for key in keys}
        try:
            load(state, storage_reader=Reader(os.fspath(self.folder)), no_dist=True)
        except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
            causes = getattr(error, "failures", {}).values()
            cause = next((one[0] for one in causes), error)
            raise ModelError(f"fastplug: {self.folder} cannot be read whole: {cause}") from error
        return state


class _Plain(pickle.Unpickler):
    """Knows the classes of a checkpoint's metadata and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("torch.distributed.checkpoint.") or module == "torch.distributed._shard.metadata":
            found = super().find_class(module, name)
            if isinstance(found, type):
                return found
        elif (module, name) in (("collections", "OrderedDict"), ("torch.serialization", "_get_layout")):
            return collections.OrderedDict if module == "collections" else super().find_class(module, name)
        elif module.partition(".")[0] == "pathlib" and name.endswith("Path"):
            return pathlib.PurePosixPath
        elif module == "torch":
            found = getattr(torch, name, None)
            if found is torch.Size or isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
                return found
        raise pickle.UnpicklingError(f"it names {module} {name}, which no metadata of a checkpoint needs")


def _unpickled(path: Path) -> Any:
    try:
        with open(path, "rb") as stream:
            return _Plain(stream).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, OSError) as error:
        raise ModelError(f"fastplug: {path} is no metadata of a sharded checkpoint: {error}") from error
