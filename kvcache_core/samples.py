"""The samples of a call: its inputs split along the batch, and a key for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.keys import KEY_BYTES
from kvcache_core.tree import Tree

__all__ = ["Samples", "sample_keys"]

_SHA256_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Samples:
    """A call's inputs, split along the batch.

    Attributes:
        count: B.
        tree: the structure of ``(args, kwargs)``.
        leaves: its tensors.
        is_split: per tensor, whether sample b has row b of it; the others are seen whole by every sample.
        keys: one per sample.
        way: how the module is called: how it computes, and the inputs' structure, dtypes and flags.
    """

    count: int
    tree: Tree
    leaves: list[Any]
    is_split: list[bool]
    keys: list[bytes]
    way: tuple[bytes, ...]

    def subset(self, take: Callable[[Any, Sequence[int]], Any], rows: Sequence[int]) -> list[Any]:
        """The tensors of some of the samples."""
        return [take(leaf, rows) if split else leaf for leaf, split in zip(self.leaves, self.is_split, strict=True)]


def sample_keys(
    prefix: bytes, split: Sequence[NDArray[Any]], shared: Sequence[NDArray[Any]], count: int
) -> list[bytes]:
    """A 128-bit key per sample: a digest of the sample's rows, bit by bit, and of everything all samples share.

    Args:
        prefix: namespace, salt, and the inputs' structure and flags.
        split: arrays [B, ...] of which sample b has row b.
        shared: arrays that every sample sees whole.
        count: B.
    """
    shapes = [_field(f"S{array.dtype.str}{array.shape[1:]}".encode()) for array in split]
    common = sha256(_field(prefix) + b"".join(shapes))
    for array in shared:
        common.update(_field(f"W{array.dtype.str}{array.shape}".encode()))
        common.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    # SHA-256, which processors have instructions for: rows may be pictures, and BLAKE2 takes twice as long for those.
    # What is common fills a block of it, so that it is hashed once and not once more for each sample.
    seed = sha256(common.digest().ljust(_SHA256_BLOCK, b"\0"))
    keys = []
    for sample in zip(*(_rows(array, count) for array in split), strict=True):
        digest = seed.copy()
        for row in sample:
            digest.update(row)
        keys.append(digest.digest()[:KEY_BYTES])
    return keys


def _field(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content


def _rows(array: NDArray[Any], count: int) -> list[memoryview]:
    """The bytes of each row."""
    size = array.nbytes // count
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return [content[at * size : (at + 1) * size] for at in range(count)]
