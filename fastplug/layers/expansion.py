"""LLaMA-Pro's block expansion (Wu et al. 2024, arXiv:2401.02415, section 3).

The blocks of a model are divided into groups; behind each, a copy of its last block is inserted whose output
projections are zero. A block adds to the residual stream, so such a copy adds nothing: the expanded model computes what
the original did, to the bit. Then only the copies are trained.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fastplug.errors import ModelError, OptionError
from fastplug.layers.skeleton import skeleton

# The last products of attention and of MLPs, by the names that transformers' families give them.
OUTPUTS = frozenset(
    (
        "o_proj", "out_proj", "dense", "wo", "down_proj", "dense_4h_to_h", "w2", "fc2", "fc_out", "c_proj",
        "output_linear",
    )
)  # fmt: skip
# Settings that count blocks from the first one, and lists with an entry a block.
_BORDERS = ("max_window_layers", "first_k_dense_replace", "moe_layer_start_index")
_LISTS = re.compile(r"layer|block_type|sliding_windows|indexer_types|kv_sharing_modes")
_NUMBER = ("layer_idx", "layer_id", "layer_number")


class Blocks(NamedTuple):
    """The decoder blocks of a model: the list that holds them, its name, and the config that counts them."""

    name: str
    layers: nn.ModuleList
    config: Any


def expand_blocks(
    model: Any,
    *,
    every: int | None = None,
    count: int | None = None,
    train: bool = True,
    check: bool = True,
    dtype: torch.dtype | None = None,
) -> Any:
    """Insert identity blocks into ``model``, in place.

    Args:
        model: A causal language model of transformers with its weights, unpatched and without adapters. Its base may
            be quantized: the copies are dense, of the weights that the base decodes to.
        every: Insert a copy of every ``every``-th block behind it.
        count: Or: insert this many, evenly.
        train: Freeze everything but the copies.
        check: Compare the model's outputs on a few tokens before and after.
        dtype: Of the copies. Default: that of the model's norms, or of the computation over a quantized base.

    Returns:
        ``model``. ``model.config`` describes it with its new blocks, so that it saves and loads as any other.

    Raises:
        OptionError: Neither or both of ``every`` and ``count``, or ones that the number of blocks does not allow.
        ModelError: The blocks were not found, no output projection was found in them, transformers would build other
            blocks from the new config, or an inserted block is not the identity. The model is unchanged.
    """
    blocks = find_blocks(model)
    _refuse_wrapped(model)
    source = sources(len(blocks.layers), every, count)
    expected = _outputs(model) if check else None
    with _unchanged_on_error(blocks):
        copies = rearrange(blocks, source, lambda block: _identity(block, dtype))
        check_rebuild(model, blocks)
        if expected is not None:
            _check_identity(model, expected)
    if train:
        model.requires_grad_(False)
        for block in copies:
            block.requires_grad_(True)
    return model


def sources(blocks: int, every: int | None, count: int | None) -> list[int]:
    """The old block of each new one, in order: a copy has the number of the block before it, again."""
    if (every is None) == (count is None):
        raise OptionError("fastplug.layers: expand_blocks takes every= or count=, one of them")
    number = every if every is not None else count
    assert number is not None
    if not 1 <= number <= blocks:
        name = "every" if every is not None else "count"
        raise OptionError(f"fastplug.layers: {name}={number} is impossible with {blocks} blocks")
    if every is not None:
        last = set(range(every - 1, blocks, every))
    else:
        last = {round((i + 1) * blocks / number) - 1 for i in range(number)}
    return [i for i in range(blocks) for _ in range(2 if i in last else 1)]


def rearrange(blocks: Blocks, source: Sequence[int], make_copy: Callable[[nn.Module], nn.Module]) -> list[nn.Module]:
    """Put copies into the list of blocks, number all of them, and make the config say so; returns the copies."""
    old = list(blocks.layers)
    new = [make_copy(old[j]) if i and source[i - 1] == j else old[j] for i, j in enumerate(source)]
    expand_config(blocks.config, source)
    number(new)
    del blocks.layers[:]
    blocks.layers.extend(new)
    return [block for i, block in enumerate(new) if i and source[i - 1] == source[i]]


@contextlib.contextmanager
def _unchanged_on_error(blocks: Blocks) -> Iterator[None]:
    config, layers = copy.deepcopy(blocks.config.__dict__), list(blocks.layers)
    try:
        yield
    except BaseException:
        blocks.config.__dict__.clear()
        blocks.config.__dict__.update(config)
        del blocks.layers[:]
        blocks.layers.extend(layers)
        number(layers)
        raise


def find_blocks(model: Any) -> Blocks:
    """The decoder blocks of ``model``. Raises :class:`ModelError` where there is no such list."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(config, "num_hidden_layers", None)
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, nn.ModuleList) and len(module) == depth and any(True for _ in _output_parts(module[0])):
            return Blocks(name, module, config)
    raise ModelError(
        f"fastplug.layers: {type(model).__name__} has no list of {depth or 'config.num_hidden_layers'} decoder blocks "
        "with output projections, so there is nothing to expand"
    )


def expand_config(config: Any, source: Sequence[int]) -> None:
    """Make ``config`` describe the expanded model: the number of blocks, and whatever it says block by block."""
    depth = config.num_hidden_layers
    for name, value in list(config.__dict__.items()):
        if isinstance(value, (list, tuple)) and len(value) == depth and _LISTS.search(name):
            setattr(config, name, type(value)(value[old] for old in source))
        elif name in _BORDERS and isinstance(value, int) and 0 <= value <= depth:
            setattr(config, name, sum(old < value for old in source))
    config.num_hidden_layers = len(source)


def _output_parts(block: nn.Module) -> list[nn.Parameter]:
    """The weights and biases of the last products of attention and MLP."""
    found: dict[int, nn.Parameter] = {}
    for name, parameter in block.named_parameters():
        if OUTPUTS.intersection(name.split(".")):
            found[id(parameter)] = parameter
    return list(found.values())


def _identity(block: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A dense copy of ``block`` that adds nothing to the residual stream."""
    from fastplug.layers.dense import dense_copy

    made = dense_copy(block, dtype)
    with torch.no_grad():
        for parameter in _output_parts(made):
            parameter.zero_()
    return made


def number(blocks: Sequence[nn.Module]) -> None:
    """Give the parts of each block its number: they find their place in a cache by it."""
    for i, block in enumerate(blocks):
        for module in block.modules():
            for name in _NUMBER:
                if isinstance(module.__dict__.get(name), int):
                    module.__dict__[name] = i


def _refuse_wrapped(model: nn.Module) -> None:
    from fastplug.patching.sites import KEY

    for name, module in model.named_modules():
        if KEY in module.__dict__:
            raise ModelError(
                "fastplug.layers: expand_blocks comes before fastplug.apply; call fastplug.undo(model) first"
            )
        if type(module).__module__.startswith("peft."):
            raise ModelError(f"fastplug.layers: {name or 'the model'} belongs to PEFT; expand the base before adapters")
        if any(parameter.device.type == "meta" for parameter in module._parameters.values() if parameter is not None):
            raise ModelError(f"fastplug.layers: {name} is on the meta device; load the model's weights first")


def _outputs(model: Any) -> torch.Tensor:
    """The logits of a few tokens."""
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(1, 9, device=device).remainder(vocabulary)[None]
    training = model.training
    try:
        with torch.no_grad():
            out: torch.Tensor = model.eval()(input_ids=tokens, use_cache=False)[0]
        return out.float()
    finally:
        model.train(training)


def _check_identity(model: Any, expected: torch.Tensor) -> None:
    difference = float((_outputs(model) - expected).abs().max())
    if not difference <= 1e-3 * float(expected.abs().max()):
        raise ModelError(
            f"fastplug.layers: the inserted blocks change the outputs of {type(model).__name__} by up to "
            f"{difference:.3g}: its blocks do more than add attention and an MLP to the residual stream"
        )


def check_rebuild(model: Any, blocks: Blocks) -> None:
    """Whether transformers builds these blocks from the new config, which may not say all that their number decides."""
    rebuilt = skeleton(copy.deepcopy(model.config), torch.float32)
    theirs = rebuilt.get_submodule(blocks.name)
    for i, (mine, other) in enumerate(zip(blocks.layers, theirs)):
        named = dict(other.named_modules())
        for name, module in mine.named_modules():
            if name not in named:
                continue  # a part of a quantized layer
            found, wanted = _facts(module), _facts(named[name])
            differing = [key for key in wanted.keys() & found.keys() if wanted[key] != found[key]]
            if differing:
                raise ModelError(
                    f"fastplug.layers: block {i} of {type(model).__name__} has {differing[0]} = {found[differing[0]]}, "
                    f"and transformers would build it with {wanted[differing[0]]}: this config cannot describe the "
                    "expanded model. Another every= or count= that keeps the pattern of its blocks may"
                )


def _facts(module: nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    skipped = ("training", "dtype", "in_features", "out_features", "gradient_checkpointing")
    return {key: value for key, value in module.__dict__.items() if isinstance(value, plain) and key not in skipped}
