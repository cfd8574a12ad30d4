"""How each system loads the same model for the same LoRA fine-tuning."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import types
from dataclasses import dataclass, field
from typing import Any

from benchmarks.rows import Row
from benchmarks.shapes import LORA, SHAPES
from benchmarks.weights import build, quantize

SYSTEMS = ("hf", "liger", "axolotl", "unsloth", "fastplug")
FROM_FOLDER = ("unsloth", "unsloth-offload", "unsloth-tiled")  # cannot be handed a model that exists
BASES = (*SYSTEMS, "hf-prepared", *FROM_FOLDER[1:])
ALIASES = {"fastplug-graphs-off": "fastplug+graphs=off", "fastplug-graphs-on": "fastplug+graphs=on"}


@dataclass(frozen=True)
class System:
    """One competitor: ``base`` says how it is loaded, ``options`` is what ``fastplug.apply`` is given."""

    name: str
    base: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> System:
        """``hf``, ``hf-prepared``, ``liger``, ``axolotl``, ``unsloth``, ``unsloth-offload``, ``unsloth-tiled`` (which
        offloads too, and has its MLPs in tiles), or ``fastplug`` with any of its options:
        ``fastplug+graphs=off+attention=host`` (``fastplug-graphs-off`` for short).

        Raises:
            ValueError: For an unknown system, or options of one that takes none.
        """
        base, *options = ALIASES.get(text, text).split("+")
        if base not in BASES or (options and base != "fastplug"):
            raise ValueError(f"{text!r} is no system: one of {', '.join((*BASES, *ALIASES))}, or fastplug+KEY=VALUE")
        values = {}
        for option in options:
            key, _, value = option.partition("=")
            try:
                values[key] = json.loads(value)
            except json.JSONDecodeError:
                values[key] = value
        return cls(text, base, values)

    def refuses(self, row: Row) -> str | None:
        """Why a row is not this system's, or None."""
        if self.base in ("liger", "axolotl") and row.prepared:
            return "its kernels want one dtype, PEFT's preparation makes norms and head fp32"
        if self.base == "axolotl" and row.autocast:
            return "its trainer runs these kernels without autocast on bf16 weights"
        if self.base in FROM_FOLDER[1:] and not row.checkpointed:
            return "nothing is offloaded without gradient checkpointing"
        return None


def preload(system: System, shape: str) -> None:
    """Import what a system needs and patch what it patches before there is a model."""
    if system.base in FROM_FOLDER:
        importlib.import_module("unsloth")  # before transformers, as it asks
        return
    for name in ("torch", "transformers", "peft", "bitsandbytes"):
        importlib.import_module(name)
    family = SHAPES[shape][0].lower()
    importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    if system.base in ("liger", "axolotl"):
        liger = importlib.import_module("liger_kernel.transformers")
        # Axolotl's kernels are an MLP forward of their own; Liger's norm, RoPE and loss are what it recommends beside.
        getattr(liger, f"apply_liger_kernel_to_{family}")(swiglu=system.base == "liger")
    if system.base == "axolotl":
        _axolotl_module(SHAPES[shape][0])
    if system.base == "fastplug":
        importlib.import_module("fastplug.patching.engine")


def load(system: System, shape: str, layers: int | None, row: Row, path: str) -> Any:
    """A model ready to train in ``row``'s setting. ``path`` is where the shape's weights lie, for Unsloth alone."""
    if system.base in FROM_FOLDER:
        return _unsloth(path, row, offload=system.base != "unsloth", tiled=system.base == "unsloth-tiled")
    model = _peft(shape, layers, row, prepared=row.prepared or system.base == "hf-prepared")
    if system.base == "axolotl":
        _axolotl_kernels(model, path)
    if system.base == "fastplug":
        import fastplug

        applied = fastplug.apply(model, strict=True, **system.options)
        print(applied.report, file=sys.stderr, flush=True)
    return model


def _peft(shape: str, layers: int | None, row: Row, prepared: bool) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = build(shape, layers)
    if row.quantization == "qlora":
        model = quantize(model)
    how = {"use_reentrant": False}
    if prepared:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=row.checkpointed, gradient_checkpointing_kwargs=how
        )
    elif row.checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **_adapter(row)))


def _adapter(row: Row) -> dict[str, Any]:
    """LoRA's options in a row. Every system takes ``use_dora``; one that dropped it would train fewer tensors than the
    unpatched model, which the report says."""
    return {**LORA, "use_dora": True} if row.dora else LORA


def _unsloth(path: str, row: Row, offload: bool, tiled: bool) -> Any:
    import torch
    from unsloth import FastLanguageModel

    qlora = row.quantization == "qlora"
    model, _ = FastLanguageModel.from_pretrained(
        path, max_seq_length=row.sequence, dtype=torch.bfloat16, load_in_4bit=qlora, load_in_16bit=not qlora,
        local_files_only=True, **({"unsloth_tiled_mlp": True} if tiled else {}),
    )  # fmt: skip
    how = "unsloth" if offload else row.checkpointed
    return FastLanguageModel.get_peft_model(model, **_adapter(row), use_gradient_checkpointing=how, random_state=0)


class _Config(dict):  # type: ignore[type-arg]
    __getattr__ = dict.get


def _axolotl_module(family: str) -> Any:
    """Axolotl's module of LoRA kernels, without its trainer: the modules that it imports for logging and configuration
    only are stood in for, the kernels are its own."""

    def logger(name: str) -> Any:
        log = logging.getLogger(name)
        log.warning_once = log.warning  # type: ignore[attr-defined]
        return log

    stand_ins: dict[str, dict[str, Any]] = {
        "axolotl.utils": {},
        "axolotl.utils.callbacks": {},
        "axolotl.utils.dict": {"DictDefault": _Config},
        "axolotl.utils.logging": {"get_logger": logger},
        "axolotl.utils.callbacks.models": {
            "get_causal_lm_model_cls_prefix": lambda kind: (family, f"{family}ForCausalLM")
        },
    }
    for name, attributes in stand_ins.items():
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        module.__path__ = []
        sys.modules[name] = module
    return importlib.import_module("axolotl.monkeypatch.lora_kernels")


def _axolotl_kernels(model: Any, path: str) -> None:
    """Patch attention class and layers as Axolotl does with its three ``lora_*_kernel`` options on.

    It asks for the model's type by its folder; the model is at hand, so it is told that one instead.

    Raises:
        RuntimeError: If a layer has kept a projection of its own: the row would measure something else.
    """
    kernels = sys.modules["axolotl.monkeypatch.lora_kernels"]
    base = model.get_base_model()
    attention = type(base.model.layers[0].self_attn)
    kernels.get_attention_cls_from_config = lambda cfg: attention  # type: ignore[attr-defined]
    cfg = _Config(base_model=path, lora_mlp_kernel=True, lora_qkv_kernel=True, lora_o_kernel=True)
    kernels.patch_self_attn_lora(cfg)
    kernels.apply_lora_kernel_patches(model, cfg)
    for layer in base.model.layers:
        used = (layer.mlp.forward, layer.self_attn.apply_qkv, layer.self_attn.apply_o)
        names = tuple(getattr(method, "__func__", method).__name__ for method in used)
        patched = attention.forward.__name__ == "axolotl_attn_forward"
        if names != ("apply_lora_mlp_swiglu", "apply_lora_qkv", "apply_lora_o") or not patched:
            raise RuntimeError(f"Axolotl's kernels are not in place: {names}, {attention.forward}")
