"""Quantized weights from the tensors of a model folder, without the library that wrote them.

:func:`quantized_weights` says which tensors of a folder make up which weight, :func:`encoded_from_tensors` makes an
:class:`EncodedWeight` of them. What a format is called is in the ``quantization_config`` of ``config.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from fastplug.errors import ModelError
from fastplug.ops import float_weights
from fastplug.ops.int_weights import Layout
from fastplug.quant.awq import awq
from fastplug.quant.bnb8 import ONE_127TH
from fastplug.quant.checking import wrong
from fastplug.quant.codec import EncodedWeight
from fastplug.quant.compressed import compressed
from fastplug.quant.fp8 import fp8
from fastplug.quant.gptq import gptq
from fastplug.quant.hqq import hqq
from fastplug.quant.packed import Packed, integers, problems, small_floats
from fastplug.quant.torchao import KNOWN, torchao

Tensors = Mapping[str, torch.Tensor]
Answer = EncodedWeight | str


class Stored(Packed):
    """The codec of weights that no module of a library holds."""

    def __init__(self, name: str) -> None:
        self.name = name


def encoded_from_tensors(
    name: str,
    tensors: Tensors,
    config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> EncodedWeight:
    """The weight of the linear layer ``name`` as a model folder stores it.

    Looks at all of it: shapes, dtypes, and that scales are finite (which waits for the device).

    Args:
        name: The layer's name in the files, such as ``model.layers.0.self_attn.q_proj``.
        tensors: At least the tensors that :func:`quantized_weights` lists for it, by their names in the files.
        config: ``quantization_config`` of ``config.json``.
        metadata: The metadata of the safetensors file, which torchao's format needs.

    Returns:
        The weight. Its tensors are those given, or views of them.

    Raises:
        ModelError: Another format, a tensor that is missing or has the wrong shape or dtype, a group size that does
            not fit, scales that are NaN; the message names the layer.
    """
    method = method_of(config)
    begin = (f"{name}.", f"{name}_")
    own = {key[len(name) :].lstrip("."): value for key, value in tensors.items() if key.startswith(begin)}
    held = ", ".join(f"{key} {tuple(value.shape)}" for key, value in sorted(own.items())) or "no tensor"
    answer: Answer
    try:
        if method == "torchao":
            answer = _torchao(Stored(method), own, (metadata or {}).get(f"{name}.weight"))
        else:
            answer = _READERS[method](Stored(method), own, {**config, **_overrides(name, config)}, name)
    except KeyError as error:
        answer = f"there is no {error.args[0]} (only {held}): the file is truncated, or of another format"
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        answer = f"its tensors ({held}) are not of this format: {error}"
    if isinstance(answer, str):
        raise ModelError(f"fastplug: {name} cannot be read as {method}: {answer}")
    for _, what in wrong([(name, flag, text) for flag, text in problems(answer)]):
        raise ModelError(f"fastplug: {name} ({method}) has {what}: the file is damaged, download it again")
    return answer


def quantized_weights(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The quantized linear layers of a folder, each with the names of the tensors that make up its weight.

    Args:
        names: The names of all tensors in the folder.
        config: ``quantization_config`` of ``config.json``.

    Raises:
        ModelError: A format that is not read here.
    """
    marks, parts = _NAMES[method_of(config)]
    names = set(names)
    found = {}
    for name in sorted(names):
        for mark in marks:
            if name.endswith(mark):
                layer = name.removesuffix(mark)
                found[layer] = sorted(layer + part for part in (*marks, *parts) if layer + part in names)
    return found


def method_of(config: Mapping[str, Any]) -> str:
    """The format by its name in ``quantization_config``.

    Raises:
        ModelError: It is not read here.
    """
    method = config.get("quant_method")
    method = str(getattr(method, "value", method))
    if method == "bitsandbytes" and config.get("load_in_8bit"):
        method = "bitsandbytes_8bit"
    if method not in _NAMES:
        raise ModelError(
            f"fastplug: weights quantized with {method} cannot be read from files; these can: {', '.join(_NAMES)}. "
            "Load the model with from_pretrained and the library that wrote it"
        )
    return method


# --- one function per format ------------------------------------------------------------------------------------------


def _bitsandbytes(codec: Packed, own: Tensors, config: Mapping[str, Any], name: str) -> Answer:
    weight, scales = own["weight"], own["SCB"]
    if weight.dtype != torch.int8 or weight.dim() != 2 or scales.shape != weight.shape[:1]:
        return f"{tuple(weight.shape)} values of {weight.dtype} with {tuple(scales.shape)} scales are not LLM.int8()"
    N, K = weight.shape
    return integers(codec, Layout((N, K), 8, group=K, sign="twos", factor=ONE_127TH), weight, scales[:, None])


def _fp8(codec: Packed, own: Tensors, config: Mapping[str, Any], name: str) -> Answer:
    weight = own["weight"]
    if weight.dim() != 2:
        return f"its weight has {weight.dim()} dimensions"
    scales = own["weight_scale_inv"] if "weight_scale_inv" in own else own["weight_scale"]
    block = config.get("weight_block_size")
    return fp8(codec, weight, scales, None if block is None or scales.dim() < 2 else tuple(block))


def _rows_fp8(codec: Packed, own: Tensors, config: Mapping[str, Any], name: str) -> Answer:
    return fp8(codec, own["weight"], own["weight_scale"])


def _modelopt(codec: Packed, own: Tensors, config: Mapping[str, Any], name: str) -> Answer:
    weight, scales, outer = own["weight"], own["weight_scale"], own.get("weight_scale_2")
    if weight.dtype != torch.uint8:
        return fp8(codec, weight, scales)
    if outer is None:
        return "there is no weight_scale_2"
    layout = float_weights.Layout((weight.shape[0], 2 * weight.shape[1]), "e2m1", (1, 16), "e4m3")
    return small_floats(codec, layout, weight, scales, outer)


def _mxfp4(codec: Packed, own: Tensors, config: Mapping[str, Any], name: str) -> Answer:
    blocks, scales = own["_blocks"], own["_scales"]
    if blocks.dim() != 3 or blocks.shape[2] != 16:
        return f"blocks of shape {tuple(blocks.shape)} are no matrix; give one expert's [rows, groups, 16]"
    layout = float_weights.Layout((blocks.shape[0], 32 * blocks.shape[1]), "e2m1", (1, 32), "e8m0")
    return small_floats(codec, layout, blocks, scales)


def _compressed(codec: Packed, own: Tensors, config: Mapping[str, Any], name: str) -> Answer:
    if config.get("sparsity_config"):
        return "its weights are sparse as well (sparsity_config)"
    if config.get("format") == "marlin-24":
        return "its weights are sparse and in the order of a kernel (marlin-24)"
    if (config.get("transform_config") or {}).get("config_groups"):
        return "its weights are rotated, and inputs would have to be too (transform_config)"
    groups = config.get("config_groups") or {}
    arguments = next((g.get("weights") for g in groups.values() if _targeted(name, g.get("targets") or ())), None)
    if arguments is None:
        return "no group of its quantization_config names it"
    packed, bits = own.get("weight_packed"), int(arguments.get("num_bits") or 8)
    if packed is None:
        shape = tuple(own["weight"].shape)
    elif "weight_shape" in own:
        shape = tuple(int(size) for size in own["weight_shape"].tolist())
    else:
        width = 8 * packed.element_size() * packed.shape[-1] // bits
        shape = (packed.shape[0], width)
    if len(shape) != 2:
        return f"its weight has shape {shape}"
    return compressed(codec, own, (shape[0], shape[1]), arguments)


def _gptq(codec: Packed, own: Tensors, config: Mapping[str, Any], name: str) -> Answer:
    form, bits, group = config.get("checkpoint_format") or "gptq", int(config["bits"]), int(config["group_size"])
    if form not in ("gptq", "gptq_v2") or config.get("pack_dtype", "int32") not in ("int32", torch.int32):
        return f"its checkpoint_format is {form!r}, packed in {config.get('pack_dtype', 'int32')}"
    qweight, g_idx = own["qweight"], own.get("g_idx")
    K = 32 * qweight.shape[0] // bits if g_idx is None else len(g_idx)
    if g_idx is None and config.get("desc_act"):
        return "it was made with act-order (desc_act) and has no g_idx"
    if g_idx is not None and group != 0 and torch.equal(g_idx.cpu(), torch.arange(K) // (K if group < 0 else group)):
        g_idx = None
    shape, first = (qweight.shape[1], K), form == "gptq"
    return gptq(codec, shape, bits, qweight, own["qzeros"], own["scales"], g_idx, group=group, first_version=first)


def _awq(codec: Packed, own: Tensors, config: Mapping[str, Any], name: str) -> Answer:
    bits, version = int(config.get("bits") or config.get("w_bit") or 4), str(config.get("version") or "gemm").lower()
    if bits != 4 or version != "gemm":
        return f"it has {bits} bits in version {version!r}, not 4 in version 'gemm'"
    qweight = own["qweight"]
    shape, group = (8 * qweight.shape[1], qweight.shape[0]), config.get("group_size", config.get("q_group_size"))
    return awq(codec, shape, qweight, own["qzeros"], own["scales"], group=int(group or -1))


def _hqq(codec: Packed, own: Tensors, config: Mapping[str, Any], name: str) -> Answer:
    """hqq stores numbers as tensors without dimensions and strings as their characters' codes."""
    meta: dict[str, Any] = {key: own[key] for key in ("scale", "zero")}
    meta["shape"], meta["axis"], meta["packing"] = own["shape"].tolist(), int(own["axis"]), _text(own["packing"])
    meta["group_size"] = int(own["group_size"]) if "group_size" in own else None
    for flag in ("view_as_float", "quant_scale", "quant_zero"):
        meta[flag] = bool(int(own[flag])) if flag in own else False
    return hqq(codec, own["W_q"], meta)


def _torchao(codec: Packed, own: Tensors, described: str | None) -> Answer:
    if described is None:
        return "the metadata of its safetensors file does not describe it (pass metadata=)"
    found = json.loads(described)
    kind, attributes = found.get("_type"), found.get("_data") or {}
    if kind not in KNOWN:
        return f"its weight is torchao's {kind}, whose layout is not read here"
    held = {key.removeprefix("_weight_"): value for key, value in own.items() if key.startswith("_weight_")}
    if not {"qdata", "scale"} <= held.keys() <= KNOWN[kind]:
        return f"torchao's {kind} holds {', '.join(sorted(held)) or 'nothing'}, which is not known here"
    if attributes.get("act_quant_kwargs") is not None or attributes.get("activation_quantization") is not None:
        return "torchao quantizes its activations too"
    N, width = held["qdata"].shape
    shape = (N, 2 * width if kind == "Int4Tensor" else width)
    return torchao(codec, kind, shape, held, attributes.get("block_size"))


def _text(values: torch.Tensor) -> str:
    return bytes(values.tolist()).decode("ascii", "replace")


def _targeted(name: str, targets: Iterable[str]) -> bool:
    """Whether compressed-tensors' targets (a class, a name, or a pattern after "re:") name a linear layer."""
    for target in targets:
        pattern = target.removeprefix("re:")
        if target == "Linear" or (target != pattern and re.match(pattern, name)) or name.endswith(target):
            return True
    return False


def _overrides(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What GPTQModel's config says of single layers (``dynamic``: a pattern, its bits and group size)."""
    for pattern, values in (config.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
            return dict(values)
    return {}


_READERS: dict[str, Callable[[Packed, Tensors, Mapping[str, Any], str], Answer]] = {
    "bitsandbytes_8bit": _bitsandbytes, "fp8": _fp8, "fbgemm_fp8": _rows_fp8, "modelopt": _modelopt, "mxfp4": _mxfp4,
    "compressed-tensors": _compressed, "gptq": _gptq, "awq": _awq, "hqq": _hqq,
}  # fmt: skip

_HQQ = (
    "scale", "zero", "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float",
    "quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config",
    "channel_wise", "optimize", "round_zero",
)  # fmt: skip
_COMPRESSED = (
    ".weight", ".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_global_scale", ".weight_g_idx",
    ".input_scale", ".input_global_scale", ".input_zero_point",
)  # fmt: skip

# Format -> (the endings of names by which a quantized layer is known, those of what else belongs to it).
_NAMES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bitsandbytes_8bit": ((".SCB",), (".weight", ".weight_format")),
    "fp8": ((".weight_scale_inv",), (".weight", ".activation_scale")),
    "fbgemm_fp8": ((".weight_scale",), (".weight", ".input_scale_ub")),
    "modelopt": ((".weight_scale",), (".weight", ".weight_scale_2", ".input_scale")),
    "mxfp4": (("_blocks",), ("_scales",)),
    "compressed-tensors": ((".weight_scale",), _COMPRESSED),
    "gptq": ((".qweight",), (".qzeros", ".scales", ".g_idx")),
    "awq": ((".qweight",), (".qzeros", ".scales")),
    "hqq": ((".W_q",), tuple(f".{part}" for part in _HQQ)),
    "torchao": (("._weight_qdata",), ("._weight_scale", "._weight_zero_point", "._weight_act_pre_scale")),
}
