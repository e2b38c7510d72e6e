"""Borders between the classes of a label, hard or soft: whether it was resized with interpolation."""

from typing import NamedTuple

import numpy as np


class Ramps(NamedTuple):
    """How the values of a label change along its rows."""

    soft: int = 0
    hard: int = 0
    pairs: frozenset[tuple[int, int]] = frozenset()  # (smaller, larger) value beside a soft border
    between: frozenset[int] = frozenset()  # the values in soft borders


def count_ramps(values: np.ndarray) -> Ramps:
    """Counts the borders along the rows of a label, uint8 or uint16 `[h, w]`, between values 2 or more apart.

    A border is hard where one value meets the other, and soft where the values rise or fall from one to the other
    over single pixels: what an interpolating resize or a lossy format makes of a hard one. In a clean label a class
    that is one pixel wide has most often the same class on both sides, or a value that is not between theirs.

    >>> count_ramps(np.array([[1, 1, 4, 7, 7, 2, 2, 3, 3]], np.uint8))
    Ramps(soft=1, hard=1, pairs=frozenset({(1, 7)}), between=frozenset({4}))
    """
    rows, columns = np.nonzero(values[:, 1:] != values[:, :-1])
    if not len(rows):
        return Ramps()
    left, right = values[rows, columns].astype(np.int64), values[rows, columns + 1].astype(np.int64)
    # A run: changes at neighbouring pixels.
    is_first = np.append(True, (rows[1:] != rows[:-1]) | (columns[1:] != columns[:-1] + 1))
    first = np.flatnonzero(is_first)
    last = np.append(first[1:], len(rows)) - 1
    length = last - first + 1
    one_way = np.abs(np.add.reduceat(np.sign(right - left), first)) == length
    start, end = left[first], right[last]
    soft = one_way & (length > 1)
    hard = (length == 1) & (np.abs(end - start) >= 2)
    ends = np.sort(np.stack([start[soft], end[soft]], 1), axis=1)
    pairs = frozenset((int(low), int(high)) for low, high in np.unique(ends, axis=0))
    between = frozenset(np.unique(left[np.repeat(soft, length) & ~is_first]).tolist())
    return Ramps(int(soft.sum()), int(hard.sum()), pairs, between)
