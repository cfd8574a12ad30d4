"""What is remembered from call to call: of one decoder layer, and of all that one ``apply`` patched."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastplug.graphs.fingerprint import Fingerprint
from fastplug.graphs.layer_graph import Buffers, Exchange, LayerGraph
from fastplug.graphs.lengths import Lengths
from fastplug.graphs.recorder import Recorder

EAGER_CALLS = 2  # calls of a shape before it is recorded: what does not come again is not worth it
CHANGES = 8  # after so many changes between calls a layer is not static
WORTH = 32  # steps that a recording of long ones is replayed, for its making to be worth it

Key = tuple[Any, ...]


@dataclass
class LayerState:
    """What one layer has recorded. It hangs on the layer's binding, so that an undo frees it."""

    fingerprint: Fingerprint
    weights: int  # elements of the layer's matrices
    dropout: bool
    calls: Counter[Any] = field(default_factory=Counter)
    row: tuple[int, int] = (-1, 0)  # an era of steady sizes, and the calls in it
    graphs: dict[Key, list[LayerGraph]] = field(default_factory=dict)
    changes: int = 0
    off: bool = False

    @classmethod
    def of(cls, layer: nn.Module) -> LayerState:
        sharded = getattr(layer, "_is_fsdp_managed_module", False)  # its weights lie elsewhere at every call
        return cls(Fingerprint(layer), matrix_elements(layer), _drops(layer), off=sharded)

    def comes_again(self, shape: Any, era: int | None) -> bool:
        """Count a call, in an era of steady sizes or at all, and tell whether it is time to record it."""
        if era is None:
            self.calls[shape] += 1
            return self.calls[shape] > EAGER_CALLS
        self.row = (era, self.row[1] + 1 if self.row[0] == era else 1)
        return self.row[1] > EAGER_CALLS

    def renew(self, layer: nn.Module) -> None:
        """Forget what was recorded: the layer is another now."""
        self.fingerprint, self.dropout = Fingerprint(layer), _drops(layer)
        self.calls.clear()
        self.graphs.clear()
        self.changes += 1
        self.off = self.changes > CHANGES


@dataclass
class Steady:
    """Long steps that keep their activations: recordings hold these for good, and other calls find the memory taken.

    So they are recorded where call after call is of one size, and let go at the first of another, or of one that is not
    trained on, such as an evaluation.
    """

    size: tuple[int, int] | None = None  # rows, and tokens of a row, of the latest calls
    era: int = 0  # how often that changed
    lengths: Lengths | None = None  # with memory of its own, all of which is free once the recordings are gone
    layers: list[tuple[LayerState, Key]] = field(default_factory=list)  # that have a recording
    calls: int = 0  # of layers, since the size changed
    changes: int = 0  # how often recordings were let go before they were worth it
    off: bool = False

    def see(self, size: tuple[int, int] | None) -> None:
        """A call of this size begins, or with None one that is not trained on."""
        if size == self.size:
            self.calls += 1
            return
        if self.layers:
            self.changes += self.calls < WORTH * len(self.layers)
            self.off = self.changes > CHANGES
            self.let_go()
        self.size, self.calls = size, 1
        self.era += 1

    def let_go(self) -> None:
        for state, key in self.layers:
            state.graphs.pop(key, None)
        self.layers.clear()
        self.lengths = None


@dataclass
class Shared:
    """What the layers of one ``apply`` share."""

    recorder: Recorder | None
    device: torch.device
    off: str | None = None  # why nothing is recorded any more
    recording: bool = False  # or compiling ahead: other parameters stand in for the layer's
    warmed: set[Any] = field(default_factory=set)
    ahead: bool = False  # whether kernels are compiled before the first layer of a kind runs
    compiled: set[type] = field(default_factory=set)  # kinds for which that is done
    buffers: dict[Any, Buffers] = field(default_factory=dict)  # of layers under gradient checkpointing
    exchanges: dict[Any, Exchange] = field(default_factory=dict)
    lengths: dict[type, Lengths] = field(default_factory=dict)  # of short steps that keep activations, by kind of layer
    steady: Steady = field(default_factory=Steady)

    def lengths_of(self, layer: nn.Module, steady: bool, lend: bool) -> Lengths:
        """Those to which recordings of a layer belong whose activations stay; they may ``lend`` memory if short."""
        assert self.recorder is not None
        if steady:
            self.steady.lengths = self.steady.lengths or Lengths(self.recorder.another(), lend=False)
            return self.steady.lengths
        if type(layer) not in self.lengths:
            self.lengths[type(layer)] = Lengths(self.recorder.another(), lend)
        return self.lengths[type(layer)]


def matrix_elements(layer: nn.Module) -> int:
    """Elements of the layer's matrices, 4-bit ones counted as decoded, adapters left out."""
    return sum(
        module.in_features * module.out_features
        for module in layer.modules()
        if isinstance(module, nn.Linear) and min(module.in_features, module.out_features) > 256
    )


def _drops(layer: nn.Module) -> bool:
    """Whether anything in it may draw random numbers: a dropout module, or a probability for a function."""
    for module in layer.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return True
        if any("dropout" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items()):
            return True
    return False
