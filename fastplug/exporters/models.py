"""What the exporters ask of a model: unwrap it, name its adapters, load it from folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from fastplug.errors import MissingExtra, ModelError, OptionError
from fastplug.exporters.api import ExportError
from fastplug.exporters.tensors import peft_kind

_QUANTIZED_BY = {
    "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "fp8", "fbgemm_fp8", "compressed-tensors", "gptq", "awq",
    "hqq", "torchao",
}  # fmt: skip
_8BIT_ACTIVATIONS = ("Linear8bitLt",)


def unwrap(model: Any) -> Any:
    """The transformers or PEFT model inside of DDP, DataParallel and ``torch.compile``."""
    while True:
        if "_orig_mod" in getattr(model, "_modules", {}):
            model = model._orig_mod
        elif type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            model = model.module
        else:
            return model


def base_of(model: Any) -> Any:
    """The plain transformers model of ``model`` (its PEFT layers stay inside of it).

    Raises:
        ModelError: Not a transformers model.
        ExportError: A PEFT method that is not a change of weights (prompt tuning).
    """
    model = unwrap(model)
    if not _is_module(model):
        raise ModelError(f"fastplug: export needs a model or the path of one, not {type(model).__name__}")
    if hasattr(model, "get_base_model"):  # PeftModel, PeftMixedModel
        for name, config in model.peft_config.items():
            if getattr(config, "is_prompt_learning", False):
                raise ExportError(
                    f"fastplug: adapter {name!r} ({config.peft_type}) is a prompt and has no weights to merge"
                )
        model = unwrap(model.get_base_model())
    if not (hasattr(model, "config") and hasattr(model, "save_pretrained")):
        raise ModelError(
            f"fastplug: {type(model).__name__} is not a transformers model, so there is no config to write"
        )
    return model


def _is_module(model: Any) -> bool:
    return isinstance(model, nn.Module)


def adapter_configs(model: Any) -> dict[str, Any]:
    """PEFT's configs of a PeftModel or of a transformers model with adapters of its own, by adapter name."""
    return dict(getattr(unwrap(model), "peft_config", None) or {})


def chosen_adapters(model: Any, adapter: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """``adapter`` as names, checked against those of the model; None stays None (whatever is active)."""
    if adapter is None:
        return None
    names = (adapter,) if isinstance(adapter, str) else tuple(adapter)
    known = adapter_configs(model)
    for name in names:
        if name not in known:
            has = f"its adapters are {', '.join(map(repr, known))}" if known else "it has none"
            raise OptionError(f"fastplug: the model has no adapter {name!r}; {has}")
    return names


def active_adapters(model: Any) -> tuple[str, ...]:
    """Names of the adapters that are active in some layer, in the order of their first layer."""
    found: dict[str, None] = {}
    for module in base_of(model).modules():
        if peft_kind(module):
            found.update(dict.fromkeys(module.active_adapters))
    return tuple(found)


def check_quantization(base: Any) -> None:
    """Raise :class:`ExportError` for a quantization that cannot be decoded, naming the first module that has it."""
    quantizer = getattr(base, "hf_quantizer", None)
    config = getattr(quantizer, "quantization_config", None) or getattr(base.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    method = getattr(method, "value", method)
    if config is None or method in _QUANTIZED_BY:
        return
    plain = (nn.Linear, nn.Embedding)
    odd = (name for name, part in base.named_modules() if "Linear" in type(part).__name__ and type(part) not in plain)
    raise ExportError(
        f"fastplug: the base is quantized with {method} ({next(odd, 'its linear layers')}), which cannot be decoded "
        "here; load the unquantized base, put the adapter on it, and export that"
    )


def quantizes_activations(base: Any) -> bool:
    """Whether layers of ``base`` quantize their inputs as well, which merged weights do not."""
    return any(type(module).__name__ in _8BIT_ACTIVATIONS for module in base.modules())


def named_base(model: Any) -> str:
    """The base that the adapters of ``model`` say they were trained on, or ''."""
    names = (getattr(config, "base_model_name_or_path", None) for config in adapter_configs(model).values())
    return next((str(name) for name in names if name), "")


def sixteen_bit(base: Any) -> torch.dtype:
    """The 16-bit dtype of a model: its config's, else what most weights have or were quantized from, else bf16."""
    sixteen = (torch.bfloat16, torch.float16)
    config = base.config
    named = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    named = getattr(torch, named, None) if isinstance(named, str) else named
    if named in sixteen:
        return named  # type: ignore[return-value]
    sizes = dict.fromkeys(sixteen, 0)
    for parameter in base.parameters():
        dtype = getattr(getattr(parameter, "quant_state", None), "dtype", parameter.dtype)
        if dtype in sizes:
            sizes[dtype] += parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def load(folder: str | os.PathLike[str], adapter: str | os.PathLike[str] | None, quant: str | None = None) -> Any:
    """A model from a folder, with an adapter on it where one is given; nothing is downloaded or unpickled.

    Args:
        folder: A model folder, or an adapter folder, whose config then names the base.
        adapter: An adapter folder, or None.
        quant: ``"nf4"``, ``"fp4"`` or ``"int8"``: quantize the linear layers on loading; None: as it is stored.

    Raises:
        OptionError: Another ``quant``.
        MissingExtra: transformers or PEFT is not installed.
        ExportError: A missing file, or an adapter that does not fit the base.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "exporting from a folder") from error
    source = os.fspath(folder)
    if adapter is None and os.path.isfile(os.path.join(source, "adapter_config.json")):
        source, adapter = _base_of_adapter(source), source
    if not os.path.isfile(os.path.join(source, "config.json")):
        raise ExportError(f"fastplug: {source} has no config.json, so it is not a model folder")
    config = transformers.AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    known = (getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ())
    architecture = next((cls for cls in known if cls is not None), transformers.AutoModelForCausalLM)
    key = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
    _check_index(Path(source))
    options: dict[str, Any] = {key: "auto", "local_files_only": True, "use_safetensors": True}
    if quant is not None:
        options["quantization_config"] = _bitsandbytes_config(transformers, quant)
    try:
        model = architecture.from_pretrained(source, output_loading_info=True, **options)
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"fastplug: {source} cannot be loaded: {reason[0]}") from error
    model, info = model
    for kind in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, info.get(kind) or ())):
            raise ExportError(
                f"fastplug: {source} has {len(keys)} {kind.replace('_', ' ')}, the first is {keys[0]}; the folder is "
                "damaged, or its config is that of another model: get it again"
            )
    return model if adapter is None else _with_adapter(model, Path(adapter), source)


def _bitsandbytes_config(transformers: Any, quant: str) -> Any:
    if quant == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if quant not in ("nf4", "fp4"):
        raise OptionError(f"fastplug: quant cannot be {quant!r}; one of nf4, fp4, int8")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant, bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


def _check_index(folder: Path) -> None:
    """Raise :class:`ExportError` if an index names a shard that lies outside of ``folder`` or is not there."""
    import json

    for index in folder.glob("*.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ExportError(f"fastplug: {index} is not an index of safetensors files; get it again") from error
        for name in sorted(map(str, names)):
            file = Path(os.path.normpath(folder / name))
            if os.path.isabs(name) or not file.is_relative_to(os.path.normpath(folder)):
                raise ExportError(f"fastplug: {index} names {name!r}, which lies outside of the folder; do not use it")
            if not file.is_file():
                raise ExportError(f"fastplug: {folder} has no {name}, which its index names; get the model again")


def _base_of_adapter(folder: str) -> str:
    import json

    with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as stream:
        name = json.load(stream).get("base_model_name_or_path") or ""
    found = local_folder(name)
    if found is None:
        raise ExportError(
            f"fastplug: the adapter in {folder} is for {name!r}, which is neither a folder nor in the local cache; "
            "pass the base's folder as the model and this one as adapter="
        )
    return str(found)


def local_folder(name: str, marker: str = "config.json") -> Path | None:
    """The folder of a model: ``name`` itself, or its snapshot in the local cache if that has ``marker``."""
    if not name:
        return None
    if os.path.isdir(name):
        return Path(name)
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        found = try_to_load_from_cache(name, marker)
    except (ImportError, HFValidationError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def _with_adapter(model: Any, adapter: Path, base: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtra("peft", "hf", "merging an adapter folder") from error
    from safetensors import safe_open

    weights = adapter / "adapter_model.safetensors"
    for file in (adapter / "adapter_config.json", weights):
        if not file.is_file():
            raise ExportError(
                f"fastplug: {adapter} has no {file.name}, so there is no adapter to load (pickles are not)"
            )
    unfit = f"fastplug: the adapter in {adapter} does not fit the base {base}"
    try:
        wrapped = peft.PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()
        raise ExportError(f"{unfit}: {reason[-1].strip() if reason else type(error).__name__}") from error
    with safe_open(weights, "pt") as stream:
        stored = set(stream.keys())
    expected = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    missing, extra = sorted(expected - stored), sorted(name for name in stored - expected if "lora_" in name)
    if missing or extra:
        raise ExportError(
            f"{unfit}: {len(missing)} tensors missing, {len(extra)} without a place (first: {(missing + extra)[0]})"
        )
    from fastplug.exporters.adapter_base import check_base  # which needs local_folder of this module

    check_base(adapter, base)
    return wrapped
