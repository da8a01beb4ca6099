"""A step as tensors: the packed plan, and the attention that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from kvcache_core.errors import InvalidInput, InvalidType
from kvcache_keras.kernels import Scoring, attend, attend_in_chunks, causal_mask, reshape
from kvcache_keras.levels import Level, attend_partly, merged
from kvcache_keras.packing import group_shapes
from kvcache_keras.recorder import check_query
from kvcache_keras.states import note_context, with_context
from kvcache_keras.store import TensorStore, dtype_name

__all__ = ["Step"]

_Tensor = Any


@dataclass
class Step:
    """One step while the model runs or is traced.

    Args:
        store: where K and V lie.
        dtype: the model's dtype of K and V.
        packed: tensors in the order of :func:`kvcache_keras.packing.pack`.
        last_only: whether only each row's last output is wanted.
        levels: of blocks that rows share, in each layer group; with any, tokens go through them one per row.
    """

    store: TensorStore
    dtype: str
    packed: Sequence[_Tensor]
    last_only: bool
    levels: int = 0
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
    def stored(self) -> _Tensor:
        """int32 [B, T], the last position that the store has K and V of when the tokens attend."""
        return self.positions

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
        if self.positions.shape[1] == 1 and q.shape[1] is None:
            q = tf.ensure_shape(q, (q.shape[0], 1, *q.shape[2:]))
        if self.levels:
            return self._attend_shared(q, layer, scoring)
        keys, values = (self.read(layer, name, q.dtype) for name in "kv")
        if q.shape[1] == 1:
            return attend(q, keys, values, self.mask(number, scoring.window), scoring)
        first = self.group(number)[2]
        return attend_in_chunks(q, keys, values, self.positions, first, scoring)

    def _attend_shared(self, q: _Tensor, layer: int, scoring: Scoring) -> _Tensor:
        """Attention of one token per row over its own blocks, and over the shared ones of each level."""
        number, heads = self.store.layout.group_of(layer), q.shape[2]
        q = self.grouped(q, layer, scoring)
        k, v = (self.read(layer, name, q.dtype) for name in "kv")
        own = attend_partly(q, k, v, self.mask(number, scoring.window)[:, None], scoring)
        levels = [tuple(self.read(layer, name, q.dtype, level) for name in "kv") for level in self.levels_of(number)]
        y = merged([own, *self.attend_levels(q, number, levels, scoring)])
        return tf.cast(reshape(y, (-1, 1, heads, y.shape[3])), q.dtype)

    def grouped(self, q: _Tensor, layer: int, scoring: Scoring) -> _Tensor:
        """Scaled queries [B, 1, Hq, D] by K/V head: [B, H, Hq / H, D]."""
        heads = self.store.spec(layer, "k").heads
        return reshape(scoring.scaled(q), (-1, heads, q.shape[2] // heads, q.shape[3]))

    def attend_levels(
        self, q: _Tensor, number: int, context: Sequence[tuple[_Tensor, _Tensor]], scoring: Scoring
    ) -> list[_Tensor]:
        """:func:`attend_partly` of queries [B, H, M, D] over the keys and values of each shared level, by row."""
        parts, each = [], q.shape[2]
        for level, (k, v) in zip(self.levels_of(number), context, strict=True):
            key = ("level mask", id(level), each)
            if key not in self.shared:
                size = self.store.layout.block_size
                self.shared[key] = level.mask(self.positions, self.stored, scoring.window, each, size)
            parts.append(level.unstacked(attend_partly(level.stacked(q), k, v, self.shared[key], scoring), each))
        return parts

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

    def read(self, layer: int, name: str, dtype: Any, level: Level | None = None) -> _Tensor:
        """[B, H, S, D] of all that the new tokens can see; [G, H, S, D] of what the groups of a level share."""
        spec = self.store.spec(layer, name)
        number = self.store.layout.group_of(layer)
        index = self.group(number)[1] if level is None else level.blocks
        key = ("rows", number, spec.heads, id(level))
        if key not in self.shared:
            rows, width = tf.unstack(tf.shape(index))
            at = tf.range(spec.heads)[:, None] * self.packed[3] + index[:, None]
            self.shared[key] = (at, rows, width * self.store.layout.block_size)
        at, rows, context = self.shared[key]
        blocks = self.store.decoded(layer, name, lambda array: tf.gather(array, at), dtype)
        return tf.reshape(blocks, (rows, spec.heads, context, spec.size))

    def group(self, number: int) -> Sequence[_Tensor]:
        """A layer group's part of :attr:`packed`: slots, visible blocks, position of the first of them, tail slots.

        Of a state group: what :func:`pack_states` returns.
        """
        kinds = [kind for kind, _ in self.store.layout.groups[: number + 1]]
        sizes = [len(group_shapes(kind, 1, 1, levels=self.levels)) for kind in kinds]
        end = 4 + sum(sizes)
        return self.packed[end - sizes[-1] : end]

    def levels_of(self, number: int) -> list[Level]:
        """The shared levels of a layer group."""
        key = ("levels", number)
        if key not in self.shared:
            _, _, first, _, *arrays = self.group(number)
            levels = []
            for at in reversed(range(0, len(arrays), 3)):
                first -= tf.shape(arrays[at])[1] * self.store.layout.block_size
                levels.append(Level(*arrays[at : at + 3], first))
            self.shared[key] = levels
        return self.shared[key]

    def _places(self, number: int, heads: int, which: int) -> _Tensor:
        """int32 [B, T, H, 2]: (row, offset) of the group's slots."""
        key = ("places", number, heads, which)
        if key not in self.shared:
            slots = self.group(number)[which][:, :, None]
            size = self.store.layout.block_size
            rows = tf.range(heads) * self.packed[3] + slots // size
            self.shared[key] = tf.stack((rows, tf.broadcast_to(slots % size, tf.shape(rows))), axis=-1)
        return self.shared[key]

    def mask(self, number: int, window: int | None) -> _Tensor:
        """Bool [B, T, S]."""
        key = ("mask", number)
        if key not in self.shared:
            self.shared[key] = causal_mask(self.positions, self.visible_positions(number), window)
        return self.shared[key]

    def visible_positions(self, number: int) -> _Tensor:
        """int32 [B, S]: the positions of what :meth:`read` gives."""
        blocks, first = self.group(number)[1:3]
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
