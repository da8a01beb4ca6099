"""Where the bytes lie: the store protocol, and the numpy store that adapters are tested against."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvcache_core.errors import InvalidInput, OutOfMemory
from kvcache_core.layout import SCALED_DTYPES, ArraySpec, BlockLayout, PackedArray, scales_of
from kvcache_core.plan import StepPlan
from kvcache_core.quantization import decode, encode
from kvcache_core.types import BlockId

__all__ = ["BlockBytes", "KVStore", "NumpyStore", "allocating", "host_memory", "packed_view"]

BlockBytes = dict[tuple[int, str], NDArray[Any]]
"""One block's content: {(layer, array name): [entries, H, D]}, the same axis order for every store."""


class KVStore(Protocol):
    """What every store does; the contract suite in the tests runs over each of them.

    Slots and blocks are those of the layer's group; a state layer, with one entry per block, takes block ids in the
    place of slots. Values are native tensors of the store's framework. Where the layout has scales, ``write`` makes
    them and ``read`` applies them; blocks are moved as they are stored.
    """

    layout: BlockLayout
    num_blocks: int

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""

    def write(self, layer: int, name: str, slots: Any, values: Any) -> None:
        """Write ``values`` [N, H, D] at ``slots`` [N]."""

    def read(self, layer: int, name: str, slots: Any) -> Any:
        """Read [N, H, D] from ``slots`` [N]."""

    def copy_blocks(self, group: int, pairs: Any) -> None:
        """Copy whole blocks; ``pairs`` is [C, 2] of (source, destination)."""

    def export_block(self, group: int, block: int) -> BlockBytes:
        """The content of one block as numpy arrays, as it is stored: bfloat16 as uint16 bits, float8 as uint8 bits,
        scales as arrays of their own.
        """

    def import_block(self, group: int, block: int, content: BlockBytes) -> None:
        """The reverse of :meth:`export_block`."""

    def export_blocks(
        self, group: int, blocks: Sequence[int], out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """The content of N blocks as bytes, uint8 [N, ``layout.packed_bytes(group)``] as ``layout.packed`` says; in
        ``out`` if that is given.
        """

    def import_blocks(self, group: int, blocks: Sequence[int], packed: NDArray[np.uint8]) -> None:
        """The reverse of :meth:`export_blocks`; ``packed`` may be read-only."""

    def allocate(self, num_blocks: int) -> Any:
        """Memory for arrays of another capacity, for :meth:`resize`; the host's is not touched yet.

        Raises:
            OutOfMemory: there is none for one of them; nothing was changed.
        """

    def resize(
        self,
        num_blocks: int,
        moves: Sequence[Mapping[BlockId, BlockId]],
        *,
        last: int | None = None,
        arrays: Any = None,
    ) -> None:
        """Change the capacity, array by array: each old one is given back before the next new one is filled.

        Args:
            num_blocks: usable blocks from now on.
            moves: {old: new} per layer group.
            last: the last block that holds something and stays where it is; None if that may be any.
            arrays: what :meth:`allocate` gave for ``num_blocks``, used up; None to allocate now.
        """


@contextmanager
def allocating(store: KVStore, num_blocks: int) -> Iterator[None]:
    """A part that only allocates arrays of ``num_blocks`` blocks: frameworks name a lack of memory in different ways.

    Raises:
        OutOfMemory: there is none.
    """
    try:
        yield
    except (MemoryError, OSError, OverflowError, RuntimeError, ValueError) as error:
        needed = (num_blocks + 1) * store.layout.bytes_per_block
        raise OutOfMemory(
            f"no memory for {num_blocks} blocks: their arrays take {needed} bytes, beside those of the "
            f"{store.num_blocks} blocks that are there ({store.nbytes} bytes); nothing was changed. Ask for fewer "
            "blocks, or free memory first"
        ) from error


def host_memory(nbytes: int) -> mmap.mmap:
    """Zeros that take memory as they are written, and give it back when they go.

    What ``malloc`` frees between arrays that stay, it may keep: a resize would then cost all new arrays beside the old.
    """
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, nbytes)


def packed_view(packed: NDArray[np.uint8], array: PackedArray) -> NDArray[Any]:
    """One array of packed blocks uint8 [N, bytes] as a view [N, entries, H, D] of its elements' bits."""
    part = packed[:, array.offset : array.offset + array.nbytes]
    found: NDArray[Any] = part.view(array.bits).reshape(len(packed), *array.shape)
    return found


class NumpyStore:
    """Arrays of shape [H, slots, D] per layer and name (a state's: [H, blocks, D]): a head's tokens lie side by side.

    Args:
        layout: what to store; bfloat16 and float8 lie as their bits.
        num_blocks: usable blocks; the null block comes on top.
    """

    def __init__(self, layout: BlockLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.arrays: dict[tuple[int, str], NDArray[Any]] = {}
        self._specs: dict[tuple[int, str], ArraySpec] = {}
        for group in range(len(layout.groups)):
            for array in layout.packed(group):
                shape = (array.shape[1], (num_blocks + 1) * array.shape[0], array.shape[2])
                self.arrays[array.layer, array.name] = np.zeros(shape, array.bits)
        for layer in range(len(layout.layers)):
            self._specs.update({(layer, array.name): array for array in layout.stored(layer)})

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(array.nbytes for array in self.arrays.values())

    def write(self, layer: int, name: str, slots: NDArray[Any], values: NDArray[Any]) -> None:
        """Write ``values`` [N, H, D] at ``slots`` [N].

        Raises:
            InvalidInput: the values' shape is not the layout's.
        """
        array = self.arrays[layer, name]
        expected = (len(slots), array.shape[0], array.shape[2])
        if values.shape != expected:
            raise InvalidInput(f"layer {layer} array {name!r} stores [N, H, D] = {expected}, got {values.shape}")
        bits, scales = encode(values.swapaxes(0, 1), self._dtype(layer, name))
        array[:, slots] = bits
        if scales is not None:
            self.arrays[layer, scales_of(name)][:, slots] = scales

    def read(self, layer: int, name: str, slots: NDArray[Any]) -> NDArray[Any]:
        """Read [N, H, D] from ``slots`` [N]; float32 where numpy has no such type."""
        bits, dtype = self.arrays[layer, name][:, slots], self._dtype(layer, name)
        scales = self.arrays[layer, scales_of(name)][:, slots] if dtype in SCALED_DTYPES else None
        found: NDArray[Any] = decode(bits, scales, dtype).swapaxes(0, 1)
        return found

    def copy_blocks(self, group: int, pairs: NDArray[Any]) -> None:
        """Copy whole blocks; ``pairs`` is [C, 2] of (source, destination)."""
        if not len(pairs):
            return
        for array in self._group_blocks(group):
            array[:, pairs[:, 1]] = array[:, pairs[:, 0]]

    def apply_copies(self, plan: StepPlan) -> None:
        """Do the copies a plan asks for, before the step writes anything."""
        for number, group in enumerate(plan.groups):
            self.copy_blocks(number, group.copies)

    def export_block(self, group: int, block: int) -> BlockBytes:
        """The content of one block: {(layer, name): [entries, H, D]}."""
        return {
            key: self._blocks(key)[:, block].swapaxes(0, 1).copy()
            for key in self.arrays
            if self.layout.group_of(key[0]) == group
        }

    def import_block(self, group: int, block: int, content: BlockBytes) -> None:
        """The reverse of :meth:`export_block`."""
        for (layer, name), values in content.items():
            self._blocks((layer, name))[:, block] = values.swapaxes(0, 1)

    def export_blocks(
        self, group: int, blocks: Sequence[int], out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """The content of N blocks, packed: uint8 [N, bytes]."""
        packed = np.empty((len(blocks), self.layout.packed_bytes(group)), np.uint8) if out is None else out
        for array in self.layout.packed(group):
            content = self._blocks((array.layer, array.name))[:, list(blocks)]
            packed_view(packed, array)[...] = content.transpose(1, 2, 0, 3)
        return packed

    def import_blocks(self, group: int, blocks: Sequence[int], packed: NDArray[np.uint8]) -> None:
        """The reverse of :meth:`export_blocks`."""
        for array in self.layout.packed(group):
            content = packed_view(packed, array).transpose(2, 0, 1, 3)
            self._blocks((array.layer, array.name))[:, list(blocks)] = content

    def allocate(self, num_blocks: int) -> dict[tuple[int, str], NDArray[Any]]:
        """Arrays of zeros [H, blocks, entries, D]; see :meth:`KVStore.allocate`."""
        with allocating(self, num_blocks):
            return {key: self._new(key, num_blocks) for key in self.arrays}

    def _new(self, key: tuple[int, str], num_blocks: int) -> NDArray[Any]:
        old = self._blocks(key)
        shape = (old.shape[0], num_blocks + 1, *old.shape[2:])
        return np.frombuffer(host_memory(math.prod(shape) * old.itemsize), old.dtype).reshape(shape)

    def resize(
        self,
        num_blocks: int,
        moves: Sequence[Mapping[BlockId, BlockId]],
        *,
        last: int | None = None,
        arrays: dict[tuple[int, str], NDArray[Any]] | None = None,
    ) -> None:
        """Change the capacity; see :meth:`KVStore.resize`."""
        kept = min(num_blocks, self.num_blocks if last is None else last) + 1
        arrays = self.allocate(num_blocks) if arrays is None else arrays
        for key in list(arrays):
            old, new = self._blocks(key), arrays.pop(key)
            new[:, :kept] = old[:, :kept]
            for source, target in moves[self.layout.group_of(key[0])].items():
                new[:, target] = old[:, source]
            self.arrays[key] = new.reshape(new.shape[0], -1, new.shape[3])
        self.num_blocks = num_blocks

    def _dtype(self, layer: int, name: str) -> str:
        return self.layout.array_dtype(self._specs[layer, name])

    def _group_blocks(self, group: int) -> list[NDArray[Any]]:
        return [self._blocks(key) for key in self.arrays if self.layout.group_of(key[0]) == group]

    def _blocks(self, key: tuple[int, str]) -> NDArray[Any]:
        """An array's memory seen as [H, blocks, entries, D]."""
        array = self.arrays[key]
        return array.reshape(array.shape[0], -1, self.layout.entries_per_block(key[0]), array.shape[2])
