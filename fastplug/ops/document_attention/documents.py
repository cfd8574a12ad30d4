"""Where the documents of packed rows begin: known once per step, shared by all layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from fastplug.errors import DataError


class Documents:
    """The documents that lie one after another in rows of tokens. A document never goes on in the next row.

    Attributes:
        cu_seqlens: Int32 [N + 1] on the device of the rows: where each document begins among the ``rows * length``
            tokens, counted row after row, and at the end their number.
        rows, length: The shape of the rows.
        max_length: Tokens of the longest document.
    """

    def __init__(
        self,
        cu_seqlens: torch.Tensor,
        rows: int,
        length: int,
        max_length: int | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.cu_seqlens = cu_seqlens.to(torch.int32)
        self.rows, self.length = rows, length
        self._lengths = None if lengths is None else tuple(lengths)
        self.max_length: int = max(self.lengths, default=0) if max_length is None else max_length
        self._masks: dict[int | None, torch.Tensor] = {}
        if not cu_seqlens.is_cuda:  # asking a GPU would make the step wait
            self._check()

    @classmethod
    def from_positions(cls, positions: torch.Tensor) -> Documents | None:
        """The documents of rows by their ``positions`` [B, S], or None where every row is a single one.

        A document begins where a position is not the one before plus one, as transformers has it. Waits for the device.
        """
        begins = torch.ones_like(positions, dtype=torch.bool)
        begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        starts: list[int] = begins.flatten().cpu().nonzero().flatten().tolist()
        if len(starts) == positions.shape[0]:
            return None
        ends = [*starts[1:], positions.numel()]
        cu_seqlens = torch.tensor([*starts, positions.numel()], dtype=torch.int32)
        lengths = [end - start for start, end in zip(starts, ends)]
        rows, length = positions.shape
        return cls(cu_seqlens.to(positions.device, non_blocking=True), rows, length, lengths=lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document. Waits for the device, once."""
        if self._lengths is None:
            bounds = self.cu_seqlens.tolist()
            self._lengths = tuple(end - start for start, end in itertools.pairwise(bounds))
        return self._lengths

    def mask(self, window: int | None = None) -> torch.Tensor:
        """Bool [B, 1, S, S], true where query i may see key j: j <= i in the same document and, with a sliding window,
        i - j < ``window``. Made once."""
        if window is not None and window >= self.max_length:
            window = None
        if window not in self._masks:
            tokens = torch.arange(self.rows * self.length, device=self.cu_seqlens.device)
            document = torch.bucketize(tokens, self.cu_seqlens[1:], right=True).view(self.rows, 1, self.length)
            distance = tokens[: self.length, None] - tokens[: self.length]
            near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            self._masks[window] = ((document.mT == document) & near)[:, None]
        return self._masks[window]

    def _check(self) -> None:
        lengths, total = self.lengths, self.rows * self.length
        if sum(lengths) != total or min(lengths, default=0) < 0 or int(self.cu_seqlens[0]) != 0:
            raise DataError(
                f"fastplug: cu_seqlens must rise from 0 to the {total} tokens of the batch "
                f"[{self.rows}, {self.length}], not {self.cu_seqlens.tolist()}"
            )
        if self.max_length < max(lengths, default=0):
            raise DataError(
                f"fastplug: the longest document has {max(lengths)} tokens by cu_seqlens, more than the max_length "
                f"{self.max_length} that came with it"
            )


__all__ = ["Documents"]
