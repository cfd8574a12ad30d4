"""Recordings of several lengths in the memory of the longest.

A recording that keeps its activations takes their memory for good. Only one length is worked on at a time, so the
others need none of their own: before layers are recorded for another length, what those of the lengths before hold is
given back to the pool that all of them are recorded in, and is used again by what is recorded next. From then on a
replay of one length writes over what the others have left. So no layer is replayed while a forward of another length
waits for its backward, inputs are written anew after each change of length, and once memory was given back nothing more
is recorded for the lengths that had it.

A longer step finds no place in the memory of a shorter one. It is recorded in a pool of its own, and the others again
when they come. And where forwards of several lengths do wait for their backward at a time, each gets memory of its own.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastplug.graphs.layer_graph import Exchange, KeptGraph
    from fastplug.graphs.recorder import Recorder
    from fastplug.graphs.state import LayerState

RENEWALS = 8  # how often all lengths may be recorded anew
CROSSINGS = 512  # calls of layers that met another length's forward: after so many, lengths are kept apart
Shape = tuple[int, int]  # rows, and the padded length


class Length:
    """The recordings of all layers for one shape.

    Attributes:
        lengths: Those that share memory.
        exchanges: What its layers share, by what they may differ in.
        waiting: What stands for the forwards that have had no backward yet.
        closed: Whether others may have been recorded in its memory.
    """

    def __init__(self, lengths: Lengths) -> None:
        self.lengths = lengths
        self.exchanges: dict[Any, Exchange] = {}
        self.waiting: weakref.WeakSet[Any] = weakref.WeakSet()
        self.closed = False
        self._graphs: list[tuple[weakref.ref[LayerState], weakref.ref[KeptGraph]]] = []  # freed as without others

    def add(self, state: LayerState, graph: KeptGraph) -> None:
        """A layer was recorded."""
        self._graphs.append((weakref.ref(state), weakref.ref(graph)))

    def taken(self) -> bool:
        """Whether a forward of another length waits in the same memory."""
        return self.lengths.crosses(self)

    def begin(self, owner: object) -> int:
        """A forward of one layer begins, which ``owner`` stands for; a number that changes with the length."""
        self.waiting.add(owner)
        return self.lengths.turn_to(self)

    def close(self) -> None:
        """Let others be recorded in this memory."""
        for graph in () if self.closed else [reference() for _, reference in self._graphs]:
            if graph is not None:
                graph.lend(self.lengths.recorder)
        self.closed = True

    def forget(self) -> None:
        """Nothing of it is replayed any more, but what waits for its backward."""
        for owner, reference in self._graphs:
            state, graph = owner(), reference()
            for known in () if state is None else state.graphs.values():
                if graph in known:
                    known.remove(graph)


class Lengths:
    """Those of all layers of one kind, which share memory.

    Attributes:
        recorder: Records them in one pool.
        apart: Whether they share it no more.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.apart = recorder, False
        self._of: dict[Shape, Length] = {}
        self._latest: Length | None = None
        self._turn = self._crossings = self._renewals = 0

    def open(self, shape: Shape) -> Length | None:
        """Where layers are recorded for a shape; None if not in this memory, or not now."""
        found = self._of.get(shape)
        if self.crosses(found):
            return None
        most = max((math.prod(other) for other in self._of), default=math.inf)
        if math.prod(shape) > most or (found is not None and found.closed):
            self._renew()
        if self.apart:
            return None
        if shape not in self._of:
            for other in self._of.values():
                other.close()
            self._of[shape] = Length(self)
        return self._of[shape]

    def crosses(self, length: Length | None) -> bool:
        """Whether a forward of another length waits for its backward."""
        if not any(other.waiting for other in self._of.values() if other is not length):
            return False
        self._crossings += 1
        if self._crossings > CROSSINGS:
            self.apart = True
            self._renew()
        return True

    def turn_to(self, length: Length) -> int:
        """A forward of this length begins; a number that changes when another one does."""
        self._turn += self._latest is not length
        self._latest = length
        return self._turn

    @property
    def turn(self) -> int:
        return self._turn

    def _renew(self) -> None:
        """Let all recordings go, and record in a new pool. What waits for its backward keeps the present one."""
        for length in self._of.values():
            length.forget()
        self._of, self._latest = {}, None
        self._renewals += 1
        self.apart |= self._renewals > RENEWALS
        self.recorder = self.recorder.another()


__all__ = ["Length", "Lengths"]
