"""Ids, and the shape legend that every docstring uses.

Shape legend: B batch (rows), T new tokens of a step, S context tokens, H heads, D head size,
L layers, V vocabulary, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence as _Sequence
from typing import Any, NewType, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["NULL_BLOCK", "BlockId", "IntArray", "NodeId", "SeqId", "TokenArray", "TokenIds"]

BlockId = NewType("BlockId", int)
NodeId = NewType("NodeId", int)
SeqId = NewType("SeqId", int)

NULL_BLOCK = BlockId(0)
"""Stands in a block table for what a window has dropped; padding tokens write into its slots."""

TokenArray: TypeAlias = NDArray[np.int32]
IntArray: TypeAlias = NDArray[np.int64]
TokenIds: TypeAlias = "_Sequence[int] | NDArray[Any]"
