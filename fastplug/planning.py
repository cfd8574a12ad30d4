"""``fastplug.plan``: what a training run needs, from a model's config or its modules, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastplug.errors import ModelError, OptionError
from fastplug.memory.around import OPTIMIZERS
from fastplug.memory.budget import amount, gib
from fastplug.memory.forecast import Forecast, forecast
from fastplug.memory.formats import checked
from fastplug.memory.gpus import parse
from fastplug.memory.model_reading import decoder_layers
from fastplug.memory.policy import Policy
from fastplug.memory.shapes import ModelShape
from fastplug.options import Options

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STORED = {"gptq": "int4", "awq": "int4", "hqq": "int4", "fp8": "fp8", "finegrained_fp8": "fp8", "fbgemm_fp8": "fp8"}
"""transformers' ``quant_method`` -> the format that counts its bytes."""


def plan(
    model: str | Path | nn.Module,
    *,
    gpu: str | int = "H100",
    sequence: int = 2048,
    batch: int = 1,
    rank: int = 16,
    adapter: str | Path | None = None,
    quant: str | None = None,
    dtype: str = "auto",
    optimizer: str = "adamw",
    accumulation: int = 1,
    policies: Sequence[str | Policy] = (),
    residual_dtype: str | None = None,
    autocast: bool = False,
    prepared: bool = False,
    headroom: str | float | None = None,
    host_memory: str | int | None = None,
    attention: str | None = None,
) -> Forecast:
    """Foretell the memory and the time of training steps under every policy, and plan the fastest that fits.

    Args:
        model: A folder, a model id, or a model (its weights may be on the meta device). No weight is loaded; of an id
            that is not in the local cache the config is fetched.
        gpu: The name of a GPU for all that CUDA reports of it, an amount of memory such as ``"24GiB"`` (or bytes), or
            both: ``"RTX 4090: 20GiB"``. It counts reserved memory plus the CUDA context. An amount alone is taken as it
            is, and times are guessed, as of the GPU whose memory is nearest.
        sequence: Tokens of a sequence.
        batch: Sequences of a micro-batch.
        rank: Of LoRA adapters on all linear layers; 0 trains all weights. A model that is given, and an ``adapter``,
            say it themselves.
        adapter: The folder of a PEFT adapter to take the ranks and places from.
        quant: How the linear layers are stored: ``nf4``, ``fp4`` (``-single`` without double quantization), ``int8``,
            ``fp8``, ``int4``; None as the model is.
        dtype: ``bfloat16``, ``float16``, ``float32``, or ``auto`` for what the model is stored in.
        optimizer: One of ``adamw``, ``adamw_8bit``, ``paged_adamw``, ``paged_adamw_8bit``, ``lion``, ``lion_8bit``,
            ``sgd``, ``adafactor``, ``none``.
        accumulation: Micro-batches of an optimizer step. With more than one, gradients are there during the forward.
        policies: The policies that layers may have; empty: all.
        residual_dtype: Of the residual stream, as the option of that name.
        autocast: Whether products run in 16 bits over a model in float32 (``bf16=True`` of the Trainer).
        prepared: Whether PEFT's ``prepare_model_for_kbit_training`` makes embedding, norms and head float32. (A model
            that is given says it itself.)
        headroom: What to leave of the memory to others: an amount, or a fraction of the GPU's memory.
        host_memory: Pinned host memory that offloading may take: an amount. None: as much as it takes. A run takes four
            fifths of what is free, less 1 GiB.
        attention: ``sdpa``, ``eager``, ``flash_attention_2``, ...; None as the config says.

    Raises:
        OptionError: A value is impossible, or nothing fits (:class:`~fastplug.memory.solve.DoesNotFit`): the message
            has the numbers, and says whether the GPU's memory or the host's is too little.
        ModelError: The model cannot be read, or has no decoder layers.
        MissingExtra: transformers or PEFT is missing.
    """
    if optimizer not in OPTIMIZERS:
        raise OptionError(f"fastplug: optimizer cannot be {optimizer!r}; one of {', '.join(OPTIMIZERS)}")
    for name, value in (("sequence", sequence), ("batch", batch), ("accumulation", accumulation)):
        if value < 1:
            raise OptionError(f"fastplug: {name} must be at least 1, not {value}")
    if rank < 0:
        raise OptionError(f"fastplug: rank must be 0 (train all weights) or more, not {rank}")
    wanted = parse(f"{gpu}B" if isinstance(gpu, int) else gpu)
    budget, budget_from = wanted.budget, wanted.says()
    if headroom is not None:
        left = amount(headroom, "headroom", "write an amount such as '2GiB', or a fraction such as 0.1").of(budget)
        if left >= budget:
            raise OptionError(f"fastplug: a headroom of {gib(left)} leaves nothing of gpu={gpu!r}, {gib(budget)}")
        budget -= left
        budget_from = f"{gib(budget)}: {budget_from}, less {gib(left)} of headroom"
    chosen = tuple(_policy(value) for value in policies) or tuple(Policy)
    shape = shape_of(
        model,
        rank=rank,
        adapter=adapter,
        quant=quant,
        dtype=dtype,
        residual_dtype=residual_dtype,
        autocast=autocast,
        prepared=prepared,
        attention=attention,
    )
    return forecast(
        shape,
        batch,
        sequence,
        budget,
        gpu=wanted.gpu,
        guessed=not wanted.named,
        budget_from=budget_from,
        optimizer=optimizer,
        accumulating=accumulation > 1,
        policies=chosen,
        host_budget=None if host_memory is None else _host(host_memory),
    )


def shape_of(
    model: str | Path | nn.Module,
    *,
    rank: int = 16,
    adapter: str | Path | None = None,
    quant: str | None = None,
    dtype: str = "auto",
    residual_dtype: str | None = None,
    autocast: bool = False,
    prepared: bool = False,
    attention: str | None = None,
) -> ModelShape:
    """The shapes of a model. The arguments, and what is raised, are those of :func:`plan`."""
    if quant is not None:
        checked(quant)
    if isinstance(model, nn.Module):
        made, name = model, type(model).__name__
    else:
        made, stored = outline(str(model), adapter=adapter, dtype=dtype, quantized=quant is not None)
        quant, name = quant or stored, os.path.basename(os.path.normpath(str(model)))
    compute = torch.bfloat16 if autocast or (quant is not None and dtype in ("auto", "bfloat16")) else None
    given = {} if residual_dtype is None else {"residual_dtype": residual_dtype}
    sites = decoder_layers(made, Options.of(given))
    if prepared and not isinstance(model, nn.Module):
        _prepare(made)
    shape = ModelShape.of_model(
        made,
        sites,
        quant=quant,
        rank=None if isinstance(model, nn.Module) or adapter is not None else rank,
        residual_dtype=None if residual_dtype is None else DTYPES[residual_dtype],
        compute_dtype=compute,
        attention=attention,
        name=name,
    )
    positions, rope = _positions(made)
    return replace(shape, positions=positions, rope=rope)


def _positions(model: Any) -> tuple[int, str]:
    """(the longest sequence that the model's config was made for, how the rotary embedding is scaled to reach it)."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    several = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]  # kinds of layers may have their own
    said = ""
    for kind in several:
        name = kind.get("rope_type", kind.get("type", "default"))
        if name != "default":
            original = kind.get("original_max_position_embeddings")
            said = str(name) + (f", from {original:,}" if original else f", factor {kind.get('factor', '?')}")
    return int(getattr(config, "max_position_embeddings", None) or 0), said


def outline(model: str, *, adapter: str | Path | None, dtype: str, quantized: bool = False) -> tuple[Any, str | None]:
    """The model on the meta device with the adapter of a folder, unquantized, and the format it is stored in, if any.

    ``quantized`` says that it will be: then ``auto`` means bfloat16, in which the rest is loaded.
    """
    from fastplug.cli.loading import checked_dtype, host, one_sentence, with_adapter

    transformers = host()
    with one_sentence(f"the config of {model} cannot be read"):
        config = transformers.AutoConfig.from_pretrained(model)
    stored = _stored(model, getattr(config, "quantization_config", None))
    if stored is not None:
        del config.quantization_config
    wanted = checked_dtype(dtype)
    given = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if wanted == "auto":
        wanted = given if isinstance(given, torch.dtype) else torch.float32
        if (quantized or stored is not None) and wanted == torch.float32:
            wanted = torch.bfloat16
    with one_sentence(f"{model} is not a causal language model"), torch.device("meta"):
        made = _built(transformers, config).to(wanted)
        return with_adapter(made, None if adapter is None else Path(adapter), 0, train=False), stored


def _built(transformers: Any, config: Any) -> Any:
    try:
        return transformers.AutoModelForCausalLM.from_config(config)
    except ValueError:
        return transformers.AutoModelForImageTextToText.from_config(config)


def _stored(model: str, stored: Any) -> str | None:
    if stored is None:
        return None
    values = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(values.get("quant_method", "")).rpartition(".")[2].lower()
    if values.get("load_in_4bit"):
        single = "" if values.get("bnb_4bit_use_double_quant") else "-single"
        return str(values.get("bnb_4bit_quant_type", "nf4")) + single
    if values.get("load_in_8bit"):
        return "int8"
    if method not in STORED:
        raise ModelError(
            f"fastplug: {model} is stored in {method or 'an unknown quantization'}, whose bytes fastplug cannot count; "
            "name a format with quant, or the unquantized model"
        )
    return STORED[method]


def _prepare(model: nn.Module) -> None:
    """What PEFT's ``prepare_model_for_kbit_training`` does: 16-bit parameters that are not quantized become fp32."""
    from fastplug.memory.layer_reading import linears

    unwrap: Any = getattr(model, "get_base_model", None)
    head = (model if unwrap is None else unwrap()).get_output_embeddings()  # type: ignore[operator]
    quantized = {id(p) for linear in linears(model) if linear is not head for p in linear.parameters()}
    for p in model.parameters():
        if id(p) not in quantized and p.dtype in (torch.float16, torch.bfloat16):
            p.data = p.data.to(torch.float32)


def _policy(value: str | Policy) -> Policy:
    try:
        return Policy(value)
    except ValueError as error:
        known = ", ".join(policy.value for policy in Policy)
        raise OptionError(f"fastplug: policy cannot be {value!r}; one of {known}") from error


def _host(size: str | int) -> int:
    found = amount(f"{size}B" if isinstance(size, int) else size, "host_memory", "write an amount such as '64GiB'")
    if found.bytes is None:
        raise OptionError(f"fastplug: host_memory={size!r} has no unit; write an amount such as '64GiB'")
    return found.bytes


__all__ = ["outline", "plan", "shape_of"]
