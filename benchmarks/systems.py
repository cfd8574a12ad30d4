"""How each system loads the same model for the same LoRA fine-tuning."""

from __future__ import annotations

import importlib
import logging
import sys
import types
from typing import Any

from benchmarks.shapes import LORA


def load(system: str, path: str, *, qlora: bool, checkpointing: bool, sequence: int, prepared: bool) -> Any:
    """A model ready to train. ``prepared`` applies PEFT's k-bit preparation, which makes the residual stream fp32."""
    if system.startswith("unsloth"):
        return _unsloth(path, qlora, checkpointing, sequence, offload=system.endswith("-offload"))
    if system in ("liger", "axolotl"):
        config = importlib.import_module("transformers").AutoConfig.from_pretrained(path)
        liger = importlib.import_module("liger_kernel.transformers")
        getattr(liger, f"apply_liger_kernel_to_{config.model_type}")(swiglu=system == "liger")
    model = _peft(path, qlora, checkpointing, prepared)
    if system == "axolotl":
        _axolotl_kernels(model, path)
    if system == "fastplug":
        import fastplug

        applied = fastplug.apply(model, strict=True)
        print(applied.report, file=sys.stderr)
    return model


def _peft(path: str, qlora: bool, checkpointing: bool, prepared: bool) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization: dict[str, Any] = {}
    if qlora:
        quantization["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation="sdpa", **quantization
    )
    how = {"use_reentrant": False}
    if prepared:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=how
        )
    elif checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))


def _unsloth(path: str, qlora: bool, checkpointing: bool, sequence: int, offload: bool) -> Any:
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        path, max_seq_length=sequence, dtype=torch.bfloat16, load_in_4bit=qlora, load_in_16bit=not qlora,
        local_files_only=True,
    )  # fmt: skip
    how = "unsloth" if offload else checkpointing
    return FastLanguageModel.get_peft_model(model, **LORA, use_gradient_checkpointing=how, random_state=0)


class _Config(dict):  # type: ignore[type-arg]
    __getattr__ = dict.get


def _axolotl_kernels(model: Any, path: str) -> None:
    """Axolotl's LoRA kernels without its trainer: the modules that they import for logging and configuration only
    are stood in for, the kernels are its own."""

    def logger(name: str) -> Any:
        log = logging.getLogger(name)
        log.warning_once = log.warning  # type: ignore[attr-defined]
        return log

    prefix = type(model.get_base_model()).__name__.removesuffix("ForCausalLM")
    stand_ins: dict[str, dict[str, Any]] = {
        "axolotl.utils": {},
        "axolotl.utils.callbacks": {},
        "axolotl.utils.dict": {"DictDefault": _Config},
        "axolotl.utils.logging": {"get_logger": logger},
        "axolotl.utils.callbacks.models": {
            "get_causal_lm_model_cls_prefix": lambda kind: (prefix, f"{prefix}ForCausalLM")
        },
    }
    for name, attributes in stand_ins.items():
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        module.__path__ = []
        sys.modules[name] = module
    kernels = importlib.import_module("axolotl.monkeypatch.lora_kernels")
    config = _Config(
        base_model_config=path, base_model=path, lora_mlp_kernel=True, lora_qkv_kernel=True, lora_o_kernel=True
    )
    kernels.patch_self_attn_lora(config)
    kernels.apply_lora_kernel_patches(model, config)
