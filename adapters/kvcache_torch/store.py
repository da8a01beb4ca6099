"""K/V bytes in torch tensors."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcache_core.errors import InvalidInput, InvalidType
from kvcache_core.layout import SCALED_DTYPES, BlockLayout, check_dtype, scales_of
from kvcache_core.store import BlockBytes, allocating, host_memory, packed_view
from kvcache_core.types import BlockId
from kvcache_torch.hostcopy import Pair, copy_in, copy_out
from kvcache_torch.quantization import DTYPES, STORED, decoded, encoded

__all__ = ["TensorStore", "dtype_name", "stored_dtype_name", "torch_dtype"]

_AT_ONCE = 256
"""Blocks that a resize moves in one copy beside the arrays."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a layout's dtype name."""
    return DTYPES[name]


def dtype_name(dtype: torch.dtype | str) -> str:
    """The layout's name of a torch dtype.

    Raises:
        InvalidType: a dtype that the cache cannot store.
    """
    for name, known in DTYPES.items():
        if dtype in (known, name):
            return name
    raise InvalidType(f"dtype must be one of {sorted(DTYPES)}, got {dtype}")


def stored_dtype_name(dtype: torch.dtype | str) -> str:
    """The layout's name of a dtype to store.

    Raises:
        InvalidType: a dtype that the cache cannot store.
    """
    return check_dtype(str(dtype).removeprefix("torch.").replace("float8_e4m3fn", "float8_e4m3"))


@dataclass(slots=True)
class Call:
    """What is known of a layer's calls of attention that look alike.

    Attributes:
        looks: shapes, strides, dtypes and all else that is checked.
        native: the type of the kernel in C that :attr:`serves` is about.
        serves: whether that kernel is for such calls.
    """

    looks: tuple[Any, ...]
    native: type[Any] | None = None
    serves: bool = False


class TensorStore:
    """Tensors of shape [H, slots, D] per layer and array name (a state's: [H, blocks, D]): a head's tokens lie side by
    side, so a run of adjacent slots is a view that attention reads without a copy.

    A tensor is allocated when its layer is first used.

    Args:
        layout: what to store.
        num_blocks: usable blocks; the null block comes on top.
        device: where the tensors live.
    """

    def __init__(self, layout: BlockLayout, num_blocks: int, device: torch.device | str = "cpu") -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = torch.device(device)
        self.kv_dtype = DTYPES.get(layout.dtype)
        """The dtype that K and V can be read in as they lie; None where they have scales."""
        self._arrays: dict[tuple[int, str], Tensor] = {}
        self._allocating = threading.Lock()
        self._group_of = [layout.group_of(layer) for layer in range(len(layout.layers))]
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}
        self.calls: dict[int, Call] = {}
        """Per layer, its last right call of attention: a step sees at a glance that one like it is right too."""
        self._specs = {
            (layer, array.name): array for layer in range(len(layout.layers)) for array in layout.stored(layer)
        }

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(array.nbytes for array in list(self._arrays.values()))

    def array(self, layer: int, name: str) -> Tensor:
        """The tensor [H, slots, D] of one array."""
        array = self._arrays.get((layer, name))
        if array is None:
            # Threads may meet here in their first steps: a second tensor would lose what was written to the first.
            with self._allocating:
                array = self._arrays.get((layer, name))
                if array is None:
                    array = self._arrays[layer, name] = self._new(layer, name, self.num_blocks).zero_()
        return array

    def group_of(self, layer: int) -> int:
        """The layer group of a layer."""
        return self._group_of[layer]

    def pair(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of an attention layer, each [H, slots, D]."""
        found = self._pairs.get(layer)
        if found is None:
            found = self._pairs[layer] = (self.array(layer, "k"), self.array(layer, "v"))
        return found

    def put(self, layer: int, name: str, slots: Tensor, values: Tensor) -> Tensor:
        """Write ``values`` [H, N, D] at int64 ``slots`` [N]; returns what reading them gives, in their own dtype."""
        bits, scales = encoded(values, self._dtype(layer, name))
        self.array(layer, name).index_copy_(1, slots, bits)
        if scales is not None:
            self.array(layer, scales_of(name)).index_copy_(1, slots, scales)
        return decoded(bits, scales, values.dtype)

    def take(self, layer: int, name: str, slots: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """[H, N, D] at ``slots``, a slice or int64 [N], in ``dtype``; a view where there is nothing to convert."""
        scales = None
        if self._dtype(layer, name) in SCALED_DTYPES:
            scales = _at(self.array(layer, scales_of(name)), slots)
        return decoded(_at(self.array(layer, name), slots), scales, dtype)

    def _dtype(self, layer: int, name: str) -> str:
        return self.layout.array_dtype(self._specs[layer, name])

    def write(self, layer: int, name: str, slots: Any, values: Any) -> None:
        """Write ``values`` [N, H, D] at ``slots`` [N].

        Raises:
            InvalidInput: the values' shape is not the layout's.
        """
        array = self.array(layer, name)
        slots = _tensor(slots).to(self.device, torch.int64)
        values = _tensor(values).to(self.device)
        expected = (len(slots), array.shape[0], array.shape[2])
        if tuple(values.shape) != expected:
            raise InvalidInput(f"layer {layer} array {name!r} stores [N, H, D] = {expected}, got {tuple(values.shape)}")
        with torch.no_grad():
            self.put(layer, name, slots, values.transpose(0, 1))

    def read(self, layer: int, name: str, slots: Any) -> Tensor:
        """Read [N, H, D] from ``slots`` [N]; float32 where there are scales."""
        slots = _tensor(slots).to(self.device, torch.int64)
        dtype = DTYPES.get(self._dtype(layer, name), torch.float32)
        return self.take(layer, name, slots, dtype).transpose(0, 1)

    def copy_blocks(self, group: int, pairs: Any) -> None:
        """Copy whole blocks; ``pairs`` is [C, 2] of (source, destination)."""
        if not len(pairs):
            return
        pairs = _tensor(pairs).to(self.device, torch.int64)
        for key in list(self._arrays):
            if self.layout.group_of(key[0]) == group:
                blocks = self._blocks(key)
                blocks.index_copy_(1, pairs[:, 1], blocks.index_select(1, pairs[:, 0]))

    def export_block(self, group: int, block: int) -> BlockBytes:
        """The content of one block: {(layer, name): numpy [entries, H, D]}; bfloat16 and float8 as their bits."""
        content = {}
        for key in self._specs:
            if self.layout.group_of(key[0]) == group:
                values = self._blocks(key)[:, block].transpose(0, 1).contiguous().cpu()
                if values.dtype == torch.bfloat16:
                    values = values.view(torch.uint16)
                content[key] = values.numpy()
        return content

    def import_block(self, group: int, block: int, content: BlockBytes) -> None:
        """The reverse of :meth:`export_block`."""
        for key, values in content.items():
            tensor = _tensor(values)
            if self._dtype(*key) == "bfloat16":
                tensor = tensor.view(torch.bfloat16)
            self._blocks(key)[:, block].copy_(tensor.transpose(0, 1))

    def export_blocks(
        self, group: int, blocks: Sequence[int], out: np.ndarray[Any, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        """The content of N blocks, packed: uint8 [N, bytes]."""
        packed = np.empty((len(blocks), self.layout.packed_bytes(group)), np.uint8) if out is None else out
        with torch.inference_mode(False), torch.no_grad():
            if self.device.type == "cpu":
                copy_out(self._in_host_memory(group, packed), blocks)
                return packed
            index = torch.tensor(blocks, dtype=torch.int64, device=self.device)
            for spec in self.layout.packed(group):
                target = torch.from_numpy(packed_view(packed, spec)).permute(2, 0, 1, 3)
                content = self._blocks((spec.layer, spec.name)).index_select(1, index)
                target.copy_(_bits(content, target.dtype))
        return packed

    def import_blocks(self, group: int, blocks: Sequence[int], packed: np.ndarray[Any, Any]) -> None:
        """The reverse of :meth:`export_blocks`."""
        with torch.inference_mode(False), torch.no_grad():
            if self.device.type == "cpu":
                copy_in(self._in_host_memory(group, packed), blocks)
                return
            index = torch.tensor(blocks, dtype=torch.int64, device=self.device)
            for spec in self.layout.packed(group):
                content = _tensor(packed_view(packed, spec)).permute(2, 0, 1, 3).to(self.device)
                target = self._blocks((spec.layer, spec.name))
                target.index_copy_(1, index, _bits(content, target.dtype))

    def _in_host_memory(self, group: int, packed: np.ndarray[Any, Any]) -> list[Pair]:
        """Each array of a group as numpy sees it, [blocks, entries, H, D], and its part of packed blocks."""
        pairs = []
        for spec in self.layout.packed(group):
            pool = self._blocks((spec.layer, spec.name))
            if pool.dtype == torch.bfloat16:
                pool = pool.view(torch.uint16)
            pairs.append((pool.numpy().transpose(1, 2, 0, 3), packed_view(packed, spec)))
        return pairs

    def allocate(self, num_blocks: int) -> dict[tuple[int, str], Tensor]:
        """A tensor for each of the present ones, not filled; see :meth:`~kvcache_core.store.KVStore.allocate`."""
        with allocating(self, num_blocks):
            return {key: self._new(*key, num_blocks) for key in list(self._arrays)}

    def resize(
        self,
        num_blocks: int,
        moves: Sequence[Mapping[BlockId, BlockId]],
        *,
        last: int | None = None,
        arrays: dict[tuple[int, str], Tensor] | None = None,
    ) -> None:
        """Change the capacity, tensor by tensor; see :meth:`~kvcache_core.store.KVStore.resize`."""
        kept = min(num_blocks, self.num_blocks if last is None else last) + 1
        arrays = self.allocate(num_blocks) if arrays is None else arrays
        self.num_blocks = num_blocks
        for key in list(arrays):
            self._fill(key, arrays[key], kept, moves[self.layout.group_of(key[0])])
            self._arrays[key] = arrays.pop(key)
        self._pairs.clear()

    def _fill(self, key: tuple[int, str], array: Tensor, kept: int, moves: Mapping[BlockId, BlockId]) -> None:
        """Give a new tensor what the present one holds."""
        old, new = self._blocks(key), self._in_blocks(key, array)
        with torch.inference_mode(False), torch.no_grad():
            new[:, :kept] = old[:, :kept]
            if self.device.type != "cpu":
                new[:, kept:] = 0
            pairs = torch.tensor(list(moves.items()), dtype=torch.int64, device=self.device).view(-1, 2)
            for at in range(0, len(pairs), _AT_ONCE):
                sources, targets = pairs[at : at + _AT_ONCE].unbind(1)
                new.index_copy_(1, targets, old.index_select(1, sources))

    def _new(self, layer: int, name: str, num_blocks: int) -> Tensor:
        spec = self._specs[layer, name]
        shape = (spec.heads, (num_blocks + 1) * self.layout.entries_per_block(layer), spec.size)
        # Not an inference tensor even inside inference_mode: those cannot be written outside it later.
        with torch.inference_mode(False):
            dtype = STORED[self._dtype(layer, name)]
            if self.device.type == "cpu":
                return torch.frombuffer(host_memory(math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
            return torch.empty(shape, dtype=dtype, device=self.device)

    def _blocks(self, key: tuple[int, str]) -> Tensor:
        """An array's memory seen as [H, blocks, entries, D]."""
        return self._in_blocks(key, self.array(*key))

    def _in_blocks(self, key: tuple[int, str], array: Tensor) -> Tensor:
        return array.view(array.shape[0], -1, self.layout.entries_per_block(key[0]), array.shape[2])


def _tensor(values: Any) -> Tensor:
    """As a tensor, without a copy where torch can share numpy's memory (not if read-only or running backwards)."""
    if isinstance(values, np.ndarray) and (not values.flags.writeable or any(step < 0 for step in values.strides)):
        values = values.copy()
    return torch.as_tensor(values)


def _at(array: Tensor, slots: Tensor | slice) -> Tensor:
    return array[:, slots] if isinstance(slots, slice) else array.index_select(1, slots)


def _bits(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same memory, as the integers that stand for a dtype which numpy lacks."""
    return tensor if tensor.dtype == dtype else tensor.view(dtype)
