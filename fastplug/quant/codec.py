"""The contract of a weight format.

A codec reads a frozen weight from its module as a tuple of plain tensors and decodes it into a buffer of the caller.
It keeps no side object: tensors can be sharded, moved and re-read after an unshard, a library's state object cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from fastplug.ops.table import OpTable


class Damaged(str):
    """Why a weight cannot be read, where no other layout could explain it: its parts contradict each other.

    A reason like any other to those who read, but when a model is patched it is an error, for what is damaged is not
    the library's to compute either.
    """


@dataclass(frozen=True)
class EncodedWeight:
    """A weight of ``shape`` [out_features, in_features] as ``codec`` stores it.

    Attributes:
        codec: The format.
        tensors: The stored tensors (packed values, scales, nested scales), in the codec's own order.
        shape: (out_features, in_features) of the decoded weight.
        layout: What else the codec needs to decode: block sizes and such, plain values only.
    """

    codec: Codec
    tensors: tuple[torch.Tensor, ...]
    shape: tuple[int, int]
    layout: tuple[Any, ...] = ()

    @property
    def stored_densely(self) -> bool:
        """Whether the weight itself is stored, in 16 bits or more, so that nothing has to be decoded."""
        first = self.tensors[0]
        return first.shape == self.shape and first.is_floating_point() and first.dtype.itemsize > 1

    def dense(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The weight itself where it is stored densely (cast if need be), None where it has to be decoded."""
        return self.codec.dense(self, dtype)

    def decode(self, out: torch.Tensor, ops: OpTable, row_start: int = 0) -> None:
        """Decode rows ``row_start .. row_start + len(out)`` into ``out`` [rows, in_features], unit column stride."""
        self.codec.decode(self, out, ops, row_start)


class Codec(Protocol):
    """How one weight format is recognised, read, decoded.

    A codec may also have ``note``, a line that a report shows where there are layers of the format, and
    ``problems(weight, linear)``, which gives pairs of a flag (a bool tensor without dimensions, on the weight's device)
    and what is wrong with the weight's values where it is true. It is asked once, when a model is patched.
    ``decode_all(weights, out, ops)`` decodes several weights of one layout, one below the other, into ``out``
    [rows of all, in_features] at once, or returns False with nothing written.
    """

    name: str

    def matches(self, linear: nn.Module) -> bool:
        """Whether this codec is responsible for modules like ``linear``.

        Asked once per class of the module and class and dtype of its weight.
        """

    def read(self, linear: nn.Module) -> EncodedWeight | str:
        """The weight as it is now, or the reason why it cannot be read. Cheap: called at every step.

        Another layout than this codec's, or a weight that is sharded, is a plain reason; :class:`Damaged` is for parts
        that cannot belong to one weight, such as scales of the wrong number.
        """

    def compute_dtype(self, linear: nn.Module, dtype: torch.dtype) -> torch.dtype | str:
        """The dtype in which the owning library multiplies an input of ``dtype`` outside autocast.

        A reason (str) instead leaves this call to the library.
        """

    def dense(self, weight: EncodedWeight, dtype: torch.dtype) -> torch.Tensor | None:
        """See :meth:`EncodedWeight.dense`."""

    def decode(self, weight: EncodedWeight, out: torch.Tensor, ops: OpTable, row_start: int = 0) -> None:
        """See :meth:`EncodedWeight.decode`."""
