"""K/V bytes in TensorFlow variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kvcache_core.errors import InvalidInput, InvalidType
from kvcache_core.layout import MODEL_DTYPES, SCALED_DTYPES, ArraySpec, BlockLayout, check_dtype, scales_of
from kvcache_core.store import BlockBytes, allocating, host_memory, packed_view
from kvcache_core.types import BlockId
from kvcache_keras.quantization import decoded, encoded, variable_dtype

__all__ = ["TensorStore", "dtype_name", "stored_dtype_name"]

_Tensor = Any


def dtype_name(dtype: Any) -> str:
    """The layout's name of a dtype that a model computes in.

    Raises:
        InvalidType: another dtype.
    """
    name = _name(dtype)
    if name not in MODEL_DTYPES:
        raise InvalidType(f"dtype must be one of {sorted(MODEL_DTYPES)}, got {dtype!r}")
    return name


def stored_dtype_name(dtype: Any) -> str:
    """The layout's name of a dtype to store.

    Raises:
        InvalidType: a dtype that the cache cannot store.
    """
    return check_dtype(_name(dtype).replace("float8_e4m3fn", "float8_e4m3"))


def _name(dtype: Any) -> str:
    try:
        return str(keras.backend.standardize_dtype(dtype))
    except (ValueError, TypeError):
        return str(getattr(dtype, "name", dtype))


class TensorStore:
    """Variables of shape [H * (num_blocks + 1), entries, D] per layer and array name; entries is the block size, or 1.

    Row ``h * (num_blocks + 1) + block`` is a block of head h, so a gather by rows gives [B, H, blocks, block_size, D],
    which is [B, H, S, D] without a transpose. The variables are never read plainly: TensorFlow copies all of a
    variable that was ever updated by scatter.

    Args:
        layout: what to store.
        num_blocks: usable blocks; the null block comes on top.

    Attributes:
        bytes_per_token: of each layer group, in one layer.
    """

    def __init__(self, layout: BlockLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self._specs = {
            (layer, array.name): array for layer in range(len(layout.layers)) for array in layout.stored(layer)
        }
        layers = range(len(layout.layers))
        self.bytes_per_token = [
            max(layout.layer_bytes_per_token(layer) for layer in layers if layout.group_of(layer) == group)
            for group in range(len(layout.groups))
        ]
        self._graphs: dict[tuple[str, int], Any] = {}
        with tf.init_scope():
            self._arrays = {key: self._allocate(*key) for key in self._specs}

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        per_block = self.layout.bytes_per_block
        return per_block * (self.num_blocks + 1)

    @property
    def stride(self) -> int:
        """Rows per head."""
        return self.num_blocks + 1

    def array(self, layer: int, name: str) -> tf.Variable:
        """The variable [H * (num_blocks + 1), block_size, D] of one array."""
        return self._arrays[layer, name]

    def spec(self, layer: int, name: str) -> ArraySpec:
        """Heads and size of one array."""
        return self._specs[layer, name]

    def encoded(self, layer: int, name: str, values: _Tensor) -> dict[str, _Tensor]:
        """What is kept of ``values`` [..., D], by array name: elements, and where there are some scales [..., 1]."""
        bits, scales = encoded(values, self.layout.array_dtype(self._specs[layer, name]))
        return {name: bits} if scales is None else {name: bits, scales_of(name): scales}

    def decoded(self, layer: int, name: str, take: Callable[[tf.Variable], _Tensor], dtype: Any) -> _Tensor:
        """What ``take`` takes from the array, and from that of its scales if there are some, in ``dtype``."""
        scales = None
        if self.layout.array_dtype(self._specs[layer, name]) in SCALED_DTYPES:
            scales = take(self._arrays[layer, scales_of(name)])
        return decoded(take(self._arrays[layer, name]), scales, dtype)

    def rounded(self, layer: int, name: str, values: _Tensor) -> _Tensor:
        """``values`` [..., D] as they would be read after they were written."""
        return decoded(*encoded(values, self.layout.array_dtype(self._specs[layer, name])), values.dtype)

    def write(self, layer: int, name: str, slots: Any, values: Any) -> None:
        """Write ``values`` [N, H, D] at ``slots`` [N].

        Raises:
            InvalidInput: the values' shape is not the layout's.
        """
        spec = self._specs[layer, name]
        slots = np.asarray(slots)
        if not hasattr(values, "shape"):
            values = np.asarray(values)
        expected = (len(slots), spec.heads, spec.size)
        if tuple(values.shape) != expected:
            raise InvalidInput(f"layer {layer} array {name!r} stores [N, H, D] = {expected}, got {tuple(values.shape)}")
        for part, new in self.encoded(layer, name, values).items():
            self._arrays[layer, part].scatter_nd_update(self._places(layer, slots, spec.heads), new)

    def read(self, layer: int, name: str, slots: Any) -> _Tensor:
        """Read [N, H, D] from ``slots`` [N]; float32 where there are scales."""
        places = self._places(layer, np.asarray(slots), self._specs[layer, name].heads)
        dtype = self.layout.array_dtype(self._specs[layer, name])
        dtype = "float32" if dtype in SCALED_DTYPES else dtype
        return self.decoded(layer, name, lambda array: tf.gather_nd(array, places), dtype)

    def copy_blocks(self, group: int, pairs: Any) -> None:
        """Copy whole blocks; ``pairs`` is [C, 2] of (source, destination)."""
        pairs = np.asarray(pairs, np.int32).reshape(-1, 2)
        if len(pairs):
            self._copy(group, tf.constant(pairs), tf.constant(self.stride, tf.int32))

    def copy_rows(self, group: int, pairs: _Tensor, stride: _Tensor) -> None:
        """:meth:`copy_blocks` for tensors, also inside a graph: ``pairs`` int32 [C, 2], ``stride`` int32 []."""
        for key, array in self._group_arrays(group):
            rows = tf.range(self._specs[key].heads)[:, None, None] * stride + pairs
            rows = tf.reshape(rows, (-1, 2))
            tf.raw_ops.ResourceScatterUpdate(
                resource=array.handle, indices=rows[:, 1], updates=tf.gather(array, rows[:, 0])
            )

    def export_block(self, group: int, block: int) -> BlockBytes:
        """The content of one block: {(layer, name): numpy [entries, H, D]}, bfloat16 and float8 as their bits."""
        content = {}
        for key, array in self._group_arrays(group):
            values = tf.gather(array, self._rows(key, block)).numpy().swapaxes(0, 1)
            if array.dtype == tf.bfloat16:
                values = values.view(np.uint16)
            content[key] = np.ascontiguousarray(values)
        return content

    def import_block(self, group: int, block: int, content: BlockBytes) -> None:
        """The reverse of :meth:`export_block`."""
        for key, values in content.items():
            array = self._arrays[key]
            heads = np.ascontiguousarray(np.asarray(values).swapaxes(0, 1))
            if array.dtype == tf.bfloat16:
                heads = heads.view(tf.bfloat16.as_numpy_dtype)
            tf.raw_ops.ResourceScatterUpdate(
                resource=array.handle, indices=self._rows(key, block), updates=tf.constant(heads)
            )

    def export_blocks(
        self, group: int, blocks: Sequence[int], out: np.ndarray[Any, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        """The content of N blocks, packed: uint8 [N, bytes]."""
        packed = np.empty((len(blocks), self.layout.packed_bytes(group)), np.uint8) if out is None else out
        with tf.init_scope():
            contents = self._exports(group)(tf.constant(blocks, tf.int32), tf.constant(self.stride, tf.int32))
        for spec, content in zip(self.layout.packed(group), contents, strict=True):
            view = packed_view(packed, spec)
            view[...] = content.numpy().view(view.dtype).transpose(1, 2, 0, 3)
        return packed

    def import_blocks(self, group: int, blocks: Sequence[int], packed: np.ndarray[Any, Any]) -> None:
        """The reverse of :meth:`export_blocks`."""
        contents = []
        for spec in self.layout.packed(group):
            dtype = self._arrays[spec.layer, spec.name].dtype.as_numpy_dtype
            heads = np.ascontiguousarray(packed_view(packed, spec).transpose(2, 0, 1, 3))
            contents.append(heads.view(dtype))
        with tf.init_scope():
            self._imports(group)(tf.constant(blocks, tf.int32), tf.constant(self.stride, tf.int32), contents)

    def _exports(self, group: int) -> Any:
        """One graph that gathers blocks [N] of all arrays, each [H, N, block_size, D]."""
        if ("export", group) not in self._graphs:
            arrays = [(self._specs[key].heads, array) for key, array in self._group_arrays(group)]

            def gather(blocks: _Tensor, stride: _Tensor) -> list[_Tensor]:
                return [tf.gather(array, tf.range(heads)[:, None] * stride + blocks) for heads, array in arrays]

            spec = (tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int32))
            self._graphs["export", group] = tf.function(gather, input_signature=spec, autograph=False)
        return self._graphs["export", group]

    def _imports(self, group: int) -> Any:
        """One graph that scatters blocks [N] into all arrays, each from [H, N, block_size, D]."""
        if ("import", group) not in self._graphs:
            arrays = [(self._specs[key].heads, array) for key, array in self._group_arrays(group)]

            def scatter(blocks: _Tensor, stride: _Tensor, contents: list[_Tensor]) -> None:
                for (heads, array), content in zip(arrays, contents, strict=True):
                    rows = tf.range(heads)[:, None] * stride + blocks
                    tf.raw_ops.ResourceScatterUpdate(resource=array.handle, indices=rows, updates=content)

            contents = [tf.TensorSpec([heads, None, *array.shape[1:]], array.dtype) for heads, array in arrays]
            spec = (tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int32), contents)
            self._graphs["import", group] = tf.function(scatter, input_signature=spec, autograph=False)
        return self._graphs["import", group]

    def allocate(self, num_blocks: int) -> dict[tuple[int, str], np.ndarray[Any, Any]]:
        """Arrays of zeros in the host's memory; see :meth:`~kvcache_core.store.KVStore.allocate`."""
        with allocating(self, num_blocks):
            return {key: self._new(key, num_blocks) for key in self._arrays}

    def _new(self, key: tuple[int, str], num_blocks: int) -> np.ndarray[Any, Any]:
        """[H, num_blocks + 1, entries, D]."""
        spec = self._specs[key]
        shape = (spec.heads, num_blocks + 1, self.layout.entries_per_block(key[0]), spec.size)
        dtype = np.dtype(self._arrays[key].dtype.as_numpy_dtype)
        return np.frombuffer(host_memory(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)

    def resize(
        self,
        num_blocks: int,
        moves: Sequence[Mapping[BlockId, BlockId]],
        *,
        last: int | None = None,
        arrays: dict[tuple[int, str], np.ndarray[Any, Any]] | None = None,
    ) -> None:
        """Change the capacity, variable by variable; see :meth:`~kvcache_core.store.KVStore.resize`.

        The variables stay the same objects, so that traced functions go on using them.
        """
        kept = min(num_blocks, self.num_blocks if last is None else last) + 1
        arrays = self.allocate(num_blocks) if arrays is None else arrays
        old_stride, self.num_blocks = self.stride, num_blocks
        with tf.init_scope():
            for key in list(arrays):
                new, array = arrays.pop(key), self._arrays[key]
                heads = np.arange(len(new))[:, None] * old_stride
                new[:, :kept] = tf.gather(array, heads + np.arange(kept)).numpy()
                group_moves = moves[self.layout.group_of(key[0])]
                if group_moves:
                    sources, targets = np.array(list(group_moves.items())).T
                    new[:, targets] = tf.gather(array, heads + sources).numpy()
                # The old content goes before TensorFlow copies the new: one array more would have to fit otherwise.
                array.assign(tf.zeros((0, *new.shape[2:]), array.dtype))
                array.assign(new.reshape(-1, *new.shape[2:]))

    def _allocate(self, layer: int, name: str) -> tf.Variable:
        spec = self._specs[layer, name]
        shape = (spec.heads * self.stride, self.layout.entries_per_block(layer), spec.size)
        zeros = tf.zeros(shape, variable_dtype(self.layout.array_dtype(spec)))
        # The number of rows may change: a resize then needs no new trace.
        open_shape = tf.TensorShape([None, *shape[1:]])
        return tf.Variable(zeros, shape=open_shape, trainable=False, name=f"kvcache_{layer}_{name}")

    def _places(self, layer: int, slots: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
        """int64 [N, H, 2]: (row, offset) of each slot and head."""
        block, offset = np.divmod(slots.astype(np.int64)[:, None], self.layout.entries_per_block(layer))
        rows = np.arange(heads) * self.stride + block
        return np.stack([rows, np.broadcast_to(offset, rows.shape)], axis=-1)

    def _rows(self, key: tuple[int, str], block: int) -> np.ndarray[Any, Any]:
        return np.arange(self._specs[key].heads) * self.stride + block

    def _group_arrays(self, group: int) -> list[tuple[tuple[int, str], tf.Variable]]:
        return [item for item in self._arrays.items() if self.layout.group_of(item[0][0]) == group]

    @property
    def _copy(self) -> Any:
        """One graph for a copy in all layers: eager, the two operations per array would cost ten times more."""
        if not hasattr(self, "_copy_function"):
            spec = (tf.TensorSpec([None, 2], tf.int32), tf.TensorSpec([], tf.int32))
            functions = []
            for group in range(len(self.layout.groups)):

                def copy(pairs: _Tensor, stride: _Tensor, group: int = group) -> None:
                    self.copy_rows(group, pairs, stride)

                functions.append(tf.function(copy, input_signature=spec, autograph=False))
            self._copy_function = lambda group, *args: functions[group](*args)
        return self._copy_function
