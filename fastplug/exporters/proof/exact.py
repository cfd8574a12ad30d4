"""The arithmetic of a proof: fp32, on weights as they are stored.

A bf16 model that computes in bf16 is off by more than a faithful export is: on SmolLM2-135M its own rounding is a KL of
3e-3, that of bf16 weights 1e-4. So both sides of a proof compute in fp32. One decoder layer at a time is cast, so this
needs memory for one layer in fp32 (and for embedding, norm and head) and not for a model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastplug.exporters.merging import exact_fp32
from fastplug.exporters.weights import codec_of, decode, encoded_weight
from fastplug.patching.bind import MARK

_HALF = (torch.bfloat16, torch.float16)


@contextmanager
def exact_model(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode, unpatched, in fp32 arithmetic; left as it was, bit for bit."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(exact_fp32())
        stack.enter_context(_original_classes(model))
        stack.enter_context(_evaluating(model))
        stack.enter_context(_compute_dtype(model))
        stack.enter_context(_quiet("bitsandbytes"))
        stack.enter_context(_decoded_layers(model))
        blocks = _blocks(model)
        inside = {id(tensor) for block in blocks for tensor in _narrow(block)}
        stack.enter_context(_cast([tensor for tensor in _narrow(model) if id(tensor) not in inside]))
        for block in blocks:
            _cast_while_it_runs(block, stack)
        yield


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of every stack of layers (a ModuleList of modules of one class), the outermost ones."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len({type(layer) for layer in child}) == 1:
                found.extend(child)
            else:
                visit(child)

    visit(model)
    return found


def _narrow(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of 16 bits, each once; those of an encoded weight are what it is decoded from."""
    found: dict[int, Tensor] = {}
    for part in module.modules():
        if not _is_decoded(part):
            for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
                if tensor.dtype in _HALF:
                    found.setdefault(id(tensor), tensor)
    return list(found.values())


def _is_decoded(module: nn.Module) -> bool:
    """Whether a layer's weight is decoded here, so that it multiplies in fp32; LLM.int8() casts its inputs itself."""
    return codec_of(module) is not None and type(module).__name__ != "Linear8bitLt"


@contextmanager
def _decoded_layers(model: nn.Module) -> Iterator[None]:
    """Layers that a codec reads multiply by their decoded weight, in fp32, whatever their library can compute in."""

    def forward(layer: nn.Module, name: str) -> Any:
        def run(x: Tensor, *_: Any, **__: Any) -> Tensor:
            encoded = encoded_weight(layer, name)
            assert encoded is not None
            bias: Any = getattr(layer, "bias", None)
            weight = decode(layer, encoded).float()
            return nn.functional.linear(x.float(), weight, None if bias is None else bias.float())

        return run

    layers = [(name, module) for name, module in model.named_modules() if _is_decoded(module)]
    before = [(module, module.__dict__.get("forward")) for _, module in layers]
    try:
        for name, module in layers:
            module.__dict__["forward"] = forward(module, name)
        yield
    finally:
        for module, own in before:
            del module.__dict__["forward"]
            if own is not None:
                module.__dict__["forward"] = own


@contextmanager
def _cast(tensors: Sequence[Tensor]) -> Iterator[None]:
    before = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def _cast_while_it_runs(block: nn.Module, stack: ExitStack) -> None:
    running = ExitStack()

    def enter(*_: Any) -> None:
        running.enter_context(_cast(_narrow(block)))

    def leave(*_: Any) -> None:
        running.close()

    stack.callback(running.close)
    stack.callback(block.register_forward_pre_hook(enter, prepend=True).remove)
    stack.callback(block.register_forward_hook(leave, always_call=True).remove)


@contextmanager
def _original_classes(model: nn.Module) -> Iterator[None]:
    patched = [(module, type(module)) for module in model.modules() if MARK in vars(type(module))]
    try:
        for module, cls in patched:
            module.__class__ = vars(cls)[MARK]
        yield
    finally:
        for module, cls in patched:
            module.__class__ = cls


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """``eval()``, but not for bitsandbytes' 4-bit layers: on some CPUs they repack and round their weights then."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            weight: Any = module._parameters.get("weight")
            repacks = type(module).__name__ == "Linear4bit"
            repacked = getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)
            module.training = repacks and not repacked
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """No warnings of a library that casts fp32 inputs, once per layer and sequence."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _compute_dtype(model: nn.Module) -> Iterator[None]:
    """bitsandbytes multiplies in a dtype of its own."""
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    names = ("compute_dtype", "compute_type_is_set")
    before = [(layer, {name: getattr(layer, name) for name in names if hasattr(layer, name)}) for layer in layers]
    try:
        for layer, state in before:
            for name, value in zip(names, (torch.float32, True)):
                if name in state:
                    setattr(layer, name, value)
        yield
    finally:
        for layer, state in before:
            for name, value in state.items():
                setattr(layer, name, value)
