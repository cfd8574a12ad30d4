"""Best-fit decreasing bin packing."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Which items lie in which bin: indices of ``sizes``, each at most ``capacity``.

    The largest item comes first, and each goes into the fullest bin that still has room for it (D. S. Johnson,
    "Near-optimal bin packing algorithms", 1973: at most 11/9 of the best number of bins, plus a constant). Items of one
    size keep their order, so the result depends on nothing but the arguments.

    Takes O(n log n) for n items: sorting them, and per item one search among the different amounts of room left, of
    which there are at most ``capacity``.
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> the bins that have it, the latest last
    rooms: list[int] = []  # its keys, ascending
    for item in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[item]
        place = bisect_left(rooms, size)
        if place == len(rooms):
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[place]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        bins[chosen].append(item)
        left = room - size
        if left > 0:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(chosen)
    return bins


__all__ = ["best_fit_decreasing"]
