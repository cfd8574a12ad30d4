"""Which recordings that keep their activations may be replayed when, and where they lie.

Graphs of one pool may use memory again that was free when they were recorded. So what is replayed now may write over
all that was recorded later, and spares only what was recorded before and was still held then. From that follow two
rules. A layer is replayed only if all that wait for their backward were recorded before it, and a backward only if none
that was recorded later still waits; else the layer runs as usual. In an ordinary step layers are recorded and run
forward in one order and backward in the other, and both rules hold.

A recording takes the memory of its activations for good, but only one length is worked on at a time. So the others lie
in the memory of the longest: before layers are recorded for another length, what those of the lengths before hold is
given back to the pool, for what is recorded next. Then no layer is replayed while a forward of another length waits.
What is recorded for a length after it has given its memory back, with a mask say where there was none, counts as
another length. A longer step finds no place in the memory of a shorter one: it is recorded in a new pool, and the
others again when they come. Where forwards of several lengths do wait at a time, each length gets a pool of its own. A
plan counts what each length holds, so under one nothing is given back.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fastplug.graphs.layer_graph import Exchange, KeptGraph
    from fastplug.graphs.recorder import Recorder
    from fastplug.graphs.state import LayerState

RENEWALS = 8  # how often all lengths may be recorded anew
CROSSINGS = 512  # calls of layers that met another length's forward: after so many, lengths are kept apart
Shape = tuple[int, int]  # rows, and the padded length


class Waiting(NamedTuple):
    """A forward that has had no backward yet."""

    order: int  # that of its recording
    length: Length
    owner: weakref.ref[object]


class Pool:
    """Memory that recordings share."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._waiting: list[Waiting] = []  # each was recorded after those before it
        self._recorded = 0

    def recorded(self) -> int:
        """Another recording was made here: its place in the order."""
        self._recorded += 1
        return self._recorded

    def latest(self) -> Waiting | None:
        """Of the forwards that wait, the one whose recording is the latest."""
        while self._waiting and self._waiting[-1].owner() is None:
            self._waiting.pop()
        return self._waiting[-1] if self._waiting else None

    def wait(self, order: int, length: Length, owner: object) -> None:
        """A forward begins, which ``owner`` stands for until its backward is done."""
        self._waiting.append(Waiting(order, length, weakref.ref(owner)))


class Length:
    """The recordings of all layers for one shape, made before those of another one.

    Attributes:
        lengths: Those that it belongs to.
        shape: Rows, and the padded length.
        pool: Where it lies.
        exchanges: What its layers share, by what they may differ in.
        closed: Whether others may have been recorded in its memory.
    """

    def __init__(self, lengths: Lengths, shape: Shape, pool: Pool) -> None:
        self.lengths, self.shape, self.pool, self.closed = lengths, shape, pool, False
        self.exchanges: dict[Any, Exchange] = {}
        self._graphs: list[tuple[weakref.ref[LayerState], weakref.ref[KeptGraph]]] = []  # freed as without others

    def add(self, state: LayerState, graph: KeptGraph) -> None:
        """A layer was recorded."""
        self._graphs.append((weakref.ref(state), weakref.ref(graph)))

    def close(self) -> None:
        """Let others be recorded in this memory."""
        for graph in () if self.closed else [reference() for _, reference in self._graphs]:
            if graph is not None:
                graph.lend(self.pool.recorder)
        self.closed = True

    def forget(self) -> None:
        """Nothing of it is replayed any more, but what waits for its backward."""
        for owner, reference in self._graphs:
            state, graph = owner(), reference()
            for known in () if state is None else state.graphs.values():
                if graph in known:
                    known.remove(graph)


class Lengths:
    """Those of all layers of one kind.

    Args:
        recorder: Records them.
        lend: Whether they share memory.

    Attributes:
        lend: Likewise, as it is now.
    """

    def __init__(self, recorder: Recorder, lend: bool) -> None:
        self.lend = lend
        self._one_pool = True
        self._pool = Pool(recorder)
        self._all: list[Length] = []
        self._crossings = self._renewals = 0
        self._disordered = False

    def open(self, shape: Shape) -> Length | None:
        """Where a layer is recorded for a shape; None if it cannot be, for now or at all."""
        if self.lend:
            if self._crosses(shape):
                return None
            most = max((math.prod(other.shape) for other in self._all), default=math.inf)
            if math.prod(shape) > most and self._renewals < RENEWALS:
                self._renew()
        found = next((length for length in self._all if length.shape == shape and not length.closed), None)
        latest = self._pool.latest()
        if self.lend and latest is not None and latest.length is not found:  # has lent its memory
            self._disordered = True
            return None
        if found is not None:
            return found
        for other in self._all if self.lend else ():
            other.close()
        self._all.append(Length(self, shape, self._pool if self._one_pool else Pool(self._pool.recorder.another())))
        return self._all[-1]

    def bars(self, graph: KeptGraph) -> bool:
        """Whether a recording cannot be replayed now because of what waits for its backward."""
        length = graph.among
        latest = length.pool.latest()
        if latest is None:
            return False
        if self.lend and self._crosses(length.shape):
            return True
        if latest.order < graph.order and (latest.length is length or not self.lend):
            return False
        self._disordered |= latest.length.shape == length.shape and not graph.waits
        return True

    def settle(self) -> None:
        """Record all anew, in order, where layers were found to be recorded in another one than they run in.

        So it is if one of them is recorded again: after those that follow it, or beside others that have lent their
        memory.
        """
        if self._disordered and self._pool.latest() is None and self._renewals < RENEWALS:
            self._renew()

    def _crosses(self, shape: Shape) -> bool:
        """Whether a forward of another shape waits for its backward. Where that goes on, keep lengths apart."""
        latest = self._pool.latest()
        if latest is None or latest.length.shape == shape:
            return False
        self._crossings += 1
        if self._crossings > CROSSINGS:
            self.lend = self._one_pool = False
            self._renew()
        return True

    def _renew(self) -> None:
        """Let all recordings go, and record in a new pool. What waits for its backward keeps the present one."""
        for length in self._all:
            length.forget()
        self._all.clear()
        self._disordered = False
        self._renewals += 1
        self._pool = Pool(self._pool.recorder.another())


__all__ = ["Length", "Lengths", "Pool"]
