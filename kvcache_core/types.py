"""Ids, and the shape legend that every docstring uses.

Shape legend: B batch (rows), T new tokens of a step, S context tokens, H heads, D head size,
L layers, V vocabulary, N blocks.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as _Sequence
from dataclasses import dataclass
from typing import Any, NewType, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "NULL_BLOCK",
    "BlockArray",
    "BlockId",
    "Evicted",
    "IntArray",
    "NodeId",
    "PoolResize",
    "SeqId",
    "TokenArray",
    "TokenIds",
    "id_array",
    "view",
]

BlockId = NewType("BlockId", int)
NodeId = NewType("NodeId", int)
SeqId = NewType("SeqId", int)

NULL_BLOCK = BlockId(0)
"""Stands in a block table for what a window has dropped; padding tokens write into its slots."""

BlockArray: TypeAlias = NDArray[np.int32]
TokenArray: TypeAlias = NDArray[np.int32]
IntArray: TypeAlias = NDArray[np.int64]
TokenIds: TypeAlias = "_Sequence[int] | NDArray[Any]"


def view(numbers: NDArray[Any]) -> memoryview:
    """The same memory, for single entries: a memoryview reads and writes one in half of an array's time."""
    return memoryview(numbers)  # type: ignore[arg-type]


def id_array(ids: _Sequence[int] | NDArray[np.int32]) -> NDArray[Any]:
    """Ids as an array of unsigned numbers, in half the time of ``np.array``.

    Raises:
        OverflowError: one is negative (in an array it becomes one that no pool has).
    """
    if isinstance(ids, np.ndarray):
        return ids.view(np.uint32)
    return np.frombuffer(array("I", ids), np.uint32)


@dataclass(frozen=True, slots=True)
class Evicted:
    """A findable block: one whose content is given up, or that was just published.

    Attributes:
        group: its layer group.
        block: its id.
        key: the chained key of everything up to its last token; None for a tail, which has none.
        fill: tokens it holds.
        root: key of the root of its chain: it stands for the namespace and the salt.
        parent: the chained key of the block before it, or ``root``.
    """

    group: int
    block: BlockId
    key: bytes | None
    fill: int
    root: bytes
    parent: bytes


@dataclass(frozen=True, slots=True)
class PoolResize:
    """What a resize or a compaction did: evicted blocks (old ids) and the moves old id -> new id.

    Attributes:
        last: of a resize, the last block that stayed where it was; 0 if none did.
    """

    evicted: list[BlockId]
    moves: dict[BlockId, BlockId]
    last: int = 0
