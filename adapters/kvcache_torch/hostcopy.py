"""Blocks copied between packed bytes and tensors in the host's memory.

By numpy, a run of adjacent blocks at a time: PyTorch would wake its threads for each of many small copies, and an index
would make a copy of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["copy_in", "copy_out"]

Pair = tuple[NDArray[Any], NDArray[Any]]
"""One array of a layer: all its blocks [blocks, entries, H, D] in the pool, and N of them, packed."""

_WORTH_A_THREAD = 8 << 20
"""Bytes from which on a second thread copies half: with fewer, one alone is faster."""


def copy_out(pairs: Sequence[Pair], blocks: Sequence[int]) -> None:
    """Fill each packed array with the blocks' content."""
    runs = _runs(blocks)
    for pool, packed in pairs:
        for first, end in runs:
            packed[first:end] = pool[blocks[first] : blocks[first] + end - first]


def copy_in(pairs: Sequence[Pair], blocks: Sequence[int]) -> None:
    """Write each packed array into the blocks, of which none is named twice."""
    runs = _runs(blocks)

    def copy(some: Sequence[Pair]) -> None:
        for pool, packed in some:
            for first, end in runs:
                pool[blocks[first] : blocks[first] + end - first] = packed[first:end]

    if sum(packed.nbytes for _, packed in pairs) < _WORTH_A_THREAD or torch.get_num_threads() == 1:
        copy(pairs)
        return
    with ThreadPoolExecutor(1) as other:
        half = other.submit(copy, pairs[1::2])
        copy(pairs[::2])
        half.result()


def _runs(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Where runs of adjacent blocks begin and end."""
    breaks = np.flatnonzero(np.diff(blocks) != 1) + 1
    return [(first, end) for first, end in pairwise([0, *breaks.tolist(), len(blocks)]) if first < end]
