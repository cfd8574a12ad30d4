"""Models for the command line: loaded to train, or as an outline on the meta device."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastplug.errors import FastPlugError, MissingExtra, ModelError, OptionError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEFAULT_RANK = 16


@contextlib.contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Turn the errors of files, networks and configs into one sentence."""
    try:
        yield
    except FastPlugError:
        raise
    except (OSError, ValueError, KeyError, torch.OutOfMemoryError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(f"fastplug: {what}: {lines[0] if lines else type(error).__name__}") from error


def host() -> Any:
    """The transformers package.

    Raises:
        MissingExtra: It is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "a MODEL on the command line") from error
    return transformers


def model_device(name: str | None) -> torch.device:
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise OptionError(f"fastplug: there is no device {name!r}; cuda, cuda:1, cpu, ...") from error


def model_to_train(
    model: str,
    *,
    adapter: Path | None = None,
    rank: int | None = None,
    quant: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> Any:
    """A model with its weights, ready for a training step.

    Args:
        model: Model id or folder.
        adapter: The folder of an adapter.
        rank: The rank of a new adapter where none is given; None: 16; 0: no adapter, all weights train.
        quant: ``nf4`` or ``fp4`` of bitsandbytes, ``hqq`` of fastplug's own layers, or None.
        dtype: Of the weights; ``auto``: as stored.
        device: None: the first GPU, else the CPU.

    Raises:
        ModelError: It cannot be loaded.
        OptionError: An impossible combination of these.
        MissingExtra: transformers, PEFT or bitsandbytes is missing.
    """
    where = model_device(device)
    with one_sentence(f"{model} cannot be loaded"):
        loaded = _loaded(model, quant, dtype, where)
        return with_adapter(loaded, adapter, DEFAULT_RANK if rank is None else rank, train=True)


def _loaded(model: str, quant: str | None, dtype: str, device: torch.device) -> Any:
    transformers = host()
    if quant is None:
        return transformers.AutoModelForCausalLM.from_pretrained(model, torch_dtype=checked_dtype(dtype)).to(device)
    compute = torch.float32 if device.type == "cpu" else DTYPES.get(dtype, torch.bfloat16)
    weights = compute if dtype == "auto" else checked_dtype(dtype)
    if checked_quant(quant) == "hqq":
        from fastplug.layers import load

        return load(local_folder(model), quant, device=device, dtype=weights)
    require_bitsandbytes()
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        model, torch_dtype=weights, quantization_config=config, device_map={"": device}
    )


def outline(
    model: str,
    *,
    adapter: Path | None = None,
    rank: int | None = None,
    quant: str | None = None,
    dtype: str = "auto",
) -> Any:
    """The model on the meta device, from its config alone. The arguments are those of :func:`model_to_train`.

    ``rank`` None means no adapter, or 16 where ``quant`` says that an adapter is what trains.
    """
    transformers = host()
    with one_sentence(f"the config of {model} cannot be read"):
        config = transformers.AutoConfig.from_pretrained(model)
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        quant = quant or _stored_quant(model, stored)
        del config.quantization_config
    with one_sentence(f"{model} is not a causal language model"), torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(config)
        given = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        wanted = checked_dtype(dtype)
        made.to(wanted if wanted != "auto" else given if isinstance(given, torch.dtype) else torch.float32)
        if quant is not None:
            _quantize_outline(made, checked_quant(quant))
        if rank is None:
            rank = DEFAULT_RANK if quant is not None else 0
        return with_adapter(made, adapter, rank, train=False)


def with_adapter(model: Any, adapter: Path | None, rank: int, train: bool) -> Any:
    """``model`` with the adapter of a folder (its weights only with ``train``), or a new one of ``rank``."""
    if adapter is None and not rank:
        return model
    try:
        import peft
    except ImportError as error:
        raise MissingExtra("peft", "hf", "an adapter") from error
    if adapter is None:
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)
    if not (adapter / "adapter_config.json").is_file():
        raise ModelError(f"fastplug: {adapter} has no adapter_config.json, so it is not the folder of an adapter")
    if train:
        return peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    return peft.get_peft_model(model, peft.PeftConfig.from_pretrained(str(adapter)))


def make_batch(model: Any, source: str, batch: str) -> dict[str, torch.Tensor]:
    """Random tokens for ``ROWSxTOKENS``, or the lines of a text file, with labels.

    Raises:
        OptionError: Neither of these.
    """
    size = re.fullmatch(r"(\d+)x(\d+)", batch)
    if size:
        rows, length = int(size[1]), int(size[2])
        if rows < 1 or length < 2:
            raise OptionError(f"fastplug: a batch of {batch} has no token to predict")
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, model.config.get_text_config().vocab_size, (rows, length), generator=generator)
        return {"input_ids": tokens, "labels": tokens.clone()}
    if not os.path.isfile(batch):
        raise OptionError(f"fastplug: --batch is ROWSxTOKENS as in 2x64, or a text file; there is no file {batch!r}")
    lines = [line for line in Path(batch).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise OptionError(f"fastplug: {batch} holds no text")
    with one_sentence(f"the tokenizer of {source} cannot be loaded"):
        tokenizer = host().AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    encoded = tokenizer(lines, return_tensors="pt", padding=True, truncation=True, max_length=2048)
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}


def local_folder(model: str) -> Path:
    """The folder of a model: itself, or its snapshot, fetched from the hub if need be."""
    if os.path.isdir(model):
        return Path(model)
    host()
    from huggingface_hub import snapshot_download

    with one_sentence(f"{model} is neither a folder nor a model that can be fetched"):
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))


def checked_dtype(dtype: str) -> Any:
    if dtype != "auto" and dtype not in DTYPES:
        raise OptionError(f"fastplug: dtype cannot be {dtype!r}; one of auto, {', '.join(DTYPES)}")
    return DTYPES.get(dtype, dtype)


def checked_quant(quant: str) -> str:
    if quant not in ("nf4", "fp4", "hqq"):
        raise OptionError(f"fastplug: quant cannot be {quant!r}; one of nf4, fp4, hqq")
    return quant


def require_bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingExtra("bitsandbytes", "bnb", "4-bit weights") from error
    return bitsandbytes


def _stored_quant(model: str, stored: Any) -> str:
    values = stored if isinstance(stored, dict) else stored.to_dict()
    if values.get("load_in_4bit"):
        return str(values.get("bnb_4bit_quant_type", "nf4"))
    raise ModelError(
        f"fastplug: {model} is stored in {values.get('quant_method', 'an unknown quantization')}, for which there is "
        "no outline without its weights; name the unquantized model, with --quant nf4 for QLoRA"
    )


def _quantize_outline(model: Any, kind: str) -> None:
    """Quantized linear layers everywhere but the head, as loading places them; without weights."""
    make = _hqq_outline if kind == "hqq" else _outline_of_bitsandbytes(kind)
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(parent, name, make(child).requires_grad_(False))
    if kind != "hqq":
        model.is_loaded_in_4bit = True  # by which PEFT picks its layer


def _outline_of_bitsandbytes(kind: str) -> Callable[[nn.Linear], nn.Module]:
    bitsandbytes = require_bitsandbytes()

    def make(linear: nn.Linear) -> nn.Module:
        shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
        return bitsandbytes.nn.Linear4bit(  # type: ignore[no-any-return]
            *shape, bias, compute_dtype=linear.weight.dtype, quant_type=kind, device="meta"
        )

    return make


def _hqq_outline(linear: nn.Linear) -> nn.Module:
    from fastplug.layers.half_quadratic import HalfQuadratic
    from fastplug.layers.linear import QuantLinear

    return QuantLinear(HalfQuadratic()(linear.weight), linear.bias, linear.weight.dtype)
