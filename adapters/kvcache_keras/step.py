"""A step as tensors: what the plan says, packed for a graph, and the attention that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from kvcache_core.errors import InvalidInput, InvalidType
from kvcache_core.plan import PAD_SLOT, GroupPlan, StepPlan
from kvcache_keras.kernels import Scoring, attend, attend_in_chunks, causal_mask
from kvcache_keras.recorder import check_query
from kvcache_keras.states import STATE_SHAPES, note_context, pack_states, with_context
from kvcache_keras.store import TensorStore, dtype_name

__all__ = ["Step", "pack", "signature"]

_Tensor = Any


def pack(plan: StepPlan, store: TensorStore) -> list[NDArray[Any]]:
    """The plan as arrays, int32 but for frames, in the order that :func:`signature` says and :class:`Step` reads."""
    arrays: list[Any] = [plan.positions, plan.counts - 1, np.array(store.stride)]
    for group in plan.groups:
        if group.kind == "state":
            arrays += pack_states(group)
        else:
            arrays += (group.slots, *_visible_blocks(group), _tail_slots(group, plan))
    tokens = plan.tokens.astype(np.int32) if plan.frames is None else plan.frames
    return [tokens, *(array.astype(np.int32) for array in arrays)]


def signature(
    kinds: Sequence[str], block_size: int, new: int | None, frames: tuple[int, str] | None = None
) -> list[tf.TensorSpec]:
    """Specs of what :func:`pack` returns.

    Args:
        kinds: of the layer groups that the step uses.
        block_size: tokens per block.
        new: T, or None for any.
        frames: (F, dtype) of a model that takes frames.
    """
    tokens = tf.TensorSpec([None, new], tf.int32)
    if frames is not None:
        tokens = tf.TensorSpec([None, new, frames[0]], "float64" if frames[1] == "float64" else "float32")
    shapes: list[Any] = [[None, new], [None], []]
    for kind in kinds:
        shapes += _group_shapes(kind, block_size, new)
    return [tokens, *(tf.TensorSpec(shape, tf.int32) for shape in shapes)]


def _group_shapes(kind: str, block_size: int, new: int | None) -> Sequence[list[int | None]]:
    """Shapes of what stands for a layer group in a packed plan."""
    return STATE_SHAPES if kind == "state" else ([None, new], [None, None], [None], [None, block_size])


def _visible_blocks(group: GroupPlan) -> tuple[NDArray[Any], NDArray[Any]]:
    """[B, blocks] block ids that the new tokens can see, and [B] the position of the first one's first token."""
    size, table = group.block_size, group.block_tables
    if group.window is None:
        return table, np.zeros(len(table), np.int32)
    low = np.maximum(0, group.starts - group.window + 1) // size
    width = int((-(-group.ends // size) - low).max())
    columns = low[:, None] + np.arange(width)
    inside = columns < table.shape[1]
    blocks = np.take_along_axis(table, np.where(inside, columns, 0), axis=1)
    return np.where(inside, blocks, 0), low * size


def _tail_slots(group: GroupPlan, plan: StepPlan) -> NDArray[Any]:
    """[B, block_size] slots of each row's last block behind its last token; :data:`PAD_SLOT` elsewhere."""
    last = np.take_along_axis(group.slots, plan.counts[:, None] - 1, axis=1)
    offsets = np.arange(group.block_size)
    return np.where(offsets > last % group.block_size, last - last % group.block_size + offsets, PAD_SLOT)


@dataclass
class Step:
    """One step while the model runs or is traced.

    Args:
        store: where K and V lie.
        dtype: the model's dtype of K and V.
        packed: tensors in the order of :func:`pack`.
        last_only: whether only each row's last output is wanted.
    """

    store: TensorStore
    dtype: str
    packed: Sequence[_Tensor]
    last_only: bool
    selected: bool = False
    used: set[int] = field(default_factory=set)
    shared: dict[Any, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> _Tensor:
        """int32 [B, T]; or frames, float [B, T, F]."""
        return self.packed[0]

    @property
    def positions(self) -> _Tensor:
        """int32 [B, T]."""
        return self.packed[1]

    @property
    def last_index(self) -> _Tensor:
        """int32 [B], index of each row's last new token."""
        return self.packed[2]

    def attend(self, q: _Tensor, k: _Tensor, v: _Tensor, layer: int | None, scoring: Scoring) -> _Tensor:
        """Attention of one layer, [B, T, Hq, D] -> [B, T, Hq, Dv]; padding rows hold no meaning.

        Raises:
            InvalidInput: an unknown or repeated layer, or shapes that are not the layer's.
            InvalidType: another dtype than the cache's.
        """
        layer = len(self.used) if layer is None else layer
        self.check(q, k, v, layer, scoring.window)
        number = self.store.layout.group_of(layer)
        self.write(layer, "k", k)
        self.write(layer, "v", v)
        keys, values = (self.read(layer, name, q.dtype) for name in "kv")
        if q.shape[1] == 1:
            return attend(q, keys, values, self.mask(number, scoring.window), scoring)
        first = self.group(number)[2]
        return attend_in_chunks(q, keys, values, self.positions, first, scoring)

    def with_context(self, x: _Tensor, rows: int, layer: int | None) -> _Tensor:
        """Inputs [B, T, C] of a convolution behind the ``rows`` inputs before them: [B, rows + T, C].

        Raises:
            InvalidInput: an unknown or repeated layer, or shapes or a dtype that are not the layer's.
        """
        layer = len(self.used) if layer is None else layer
        layers = self.store.layout.layers
        expected = layers[layer] if 0 <= layer < len(layers) else None
        if layer in self.used:
            raise InvalidInput(f"layer {layer} was used twice in one step: give each layer its own layer=")
        found = note_context(x, rows, layer)
        if found != expected:
            raise InvalidInput(f"layer {layer} was attached as {expected}, and is used as {found}")
        self.used.add(layer)
        number = self.store.layout.group_of(layer)
        return with_context(self.store, layer, self.group(number), self.packed[3], x)

    def write(self, layer: int, name: str, values: _Tensor) -> None:
        """Put [B, T, H, D] into the step's slots, and zeros behind each row's last token.

        So whatever a row's blocks hold is its own or zero, and a hidden position's weight of 0 times its value
        is 0: it would be NaN if another sequence had left an overflow there.
        """
        number, heads = self.store.layout.group_of(layer), values.shape[2]
        for part, new in self.store.encoded(layer, name, values).items():
            array = self.store.array(layer, part)
            array.scatter_nd_update(self._places(number, heads, 0), new)
            if name != "k":  # a hidden key's score is replaced, not multiplied
                places = self._places(number, heads, 3)
                key = ("zeros", number, heads, new.shape[3], array.dtype)
                if key not in self.shared:
                    self.shared[key] = tf.zeros(tf.concat((tf.shape(places)[:-1], new.shape[3:]), 0), array.dtype)
                array.scatter_nd_update(places, self.shared[key])

    def read(self, layer: int, name: str, dtype: Any) -> _Tensor:
        """[B, H, S, D] of all that the new tokens can see."""
        spec = self.store.spec(layer, name)
        number = self.store.layout.group_of(layer)
        at = self._rows(number, spec.heads)
        blocks = self.store.decoded(layer, name, lambda array: tf.gather(array, at), dtype)
        key = ("shape", number)
        if key not in self.shared:
            rows, width = tf.unstack(tf.shape(self.group(number)[1]))
            self.shared[key] = (rows, width * self.store.layout.block_size)
        rows, context = self.shared[key]
        return tf.reshape(blocks, (rows, spec.heads, context, spec.size))

    def group(self, number: int) -> Sequence[_Tensor]:
        """A layer group's part of :attr:`packed`: slots, visible blocks, position of the first of them, tail slots.

        Of a state group: what :func:`pack_states` returns.
        """
        sizes = [len(_group_shapes(kind, 1, 1)) for kind, _ in self.store.layout.groups[: number + 1]]
        end = 4 + sum(sizes)
        return self.packed[end - sizes[-1] : end]

    def _places(self, number: int, heads: int, which: int) -> _Tensor:
        """int32 [B, T, H, 2]: (row, offset) of the group's slots."""
        key = ("places", number, heads, which)
        if key not in self.shared:
            slots = self.group(number)[which][:, :, None]
            size = self.store.layout.block_size
            rows = tf.range(heads) * self.packed[3] + slots // size
            self.shared[key] = tf.stack((rows, tf.broadcast_to(slots % size, tf.shape(rows))), axis=-1)
        return self.shared[key]

    def _rows(self, number: int, heads: int) -> _Tensor:
        """int32 [B, H, blocks]."""
        key = ("rows", number, heads)
        if key not in self.shared:
            self.shared[key] = tf.range(heads)[:, None] * self.packed[3] + self.group(number)[1][:, None]
        return self.shared[key]

    def mask(self, number: int, window: int | None) -> _Tensor:
        """Bool [B, T, S]."""
        key = ("mask", number)
        if key not in self.shared:
            self.shared[key] = causal_mask(self.positions, self.visible_positions(number), window)
        return self.shared[key]

    def visible_positions(self, number: int) -> _Tensor:
        """int32 [B, S]: the positions of what :meth:`read` gives."""
        _, blocks, first, _ = self.group(number)
        return first[:, None] + tf.range(tf.shape(blocks)[1] * self.store.layout.block_size)

    def check(self, q: _Tensor, k: _Tensor, v: _Tensor, layer: int, window: int | None) -> None:
        """Raise unless this is the layer's first call in the step, with the shapes and dtype it was attached with."""
        layers = self.store.layout.layers
        if not 0 <= layer < len(layers) or layers[layer].kind != "attention":
            count = sum(spec.kind == "attention" for spec in layers)
            raise InvalidInput(f"layer must be 0 .. {count - 1} for the attached model, got {layer}")
        if layer in self.used:
            raise InvalidInput(f"layer {layer} was used twice in one step: give each attention call its own layer=")
        spec = layers[layer]
        if window != spec.window:
            raise InvalidInput(f"layer {layer} was attached with window={spec.window}, got window={window}")
        check_query(q, k, layer)
        for name, tensor, array in zip("kv", (k, v), spec.arrays, strict=True):
            if tuple(tensor.shape[2:]) != (array.heads, array.size):
                raise InvalidInput(
                    f"{name} of layer {layer} must be [B, T, {array.heads}, {array.size}] as when the model was first "
                    f"run, got {tuple(tensor.shape)}"
                )
        found = [dtype_name(tensor.dtype) for tensor in (q, k, v)]
        if found != [self.dtype] * 3:
            raise InvalidType(
                f"q, k, v of layer {layer} must be {self.dtype} as when the model was first run, got "
                f"{', '.join(found)}; make a new cache for another dtype"
            )
        self.used.add(layer)
