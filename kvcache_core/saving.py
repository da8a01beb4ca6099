"""One sequence to a file and back, over any store: what one framework has written the other one reads."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from kvcache_core.blockformat import salt_digest
from kvcache_core.cache import BlockCache
from kvcache_core.errors import BlockRefused, InvalidInput, UsageError
from kvcache_core.layout import BlockLayout
from kvcache_core.match import first_visible_block
from kvcache_core.sequence import Sequence
from kvcache_core.statefile import SavedState, read_state, write_state
from kvcache_core.store import KVStore, packed_view

__all__ = ["layout_of", "load_sequence", "save_sequence"]


def save_sequence(
    core: BlockCache, store: KVStore, seq: Sequence, path: str | os.PathLike[str], *, weights: bytes, secret: bytes
) -> None:
    """Write everything that ``seq`` holds to a file.

    Raises:
        InvalidInput: the sequence holds no tokens.
        OSError: the file cannot be written.
    """
    layout, size = layout_of(core), core.block_size
    if not seq.length:
        raise InvalidInput(f"cannot save {seq!r}: it holds no tokens yet")
    with core.lock:
        arrays, first = {}, []
        for group in _kv_groups(layout):
            is_state = layout.groups[group][0] == "state"
            dropped = (seq.length - 1) // size if is_state else seq.dropped[group]
            first.append(seq.length - 1 if is_state else dropped * size)
            blocks = seq.tables[group][dropped : -(-seq.length // size)]
            packed = store.export_blocks(group, blocks)
            for array in layout.packed(group):
                values = packed_view(packed, array).reshape(-1, *array.shape[1:])
                arrays[array.layer, array.name] = (array.dtype, values[: seq.length - first[-1]])
        tokens = np.array(core.tokens_of(seq), np.int32)
    state = SavedState(
        tokens,
        arrays,
        tuple(first),
        _state_digest(layout),
        weights,
        salt_digest(seq.salt),
        {position: value for position, value in seq.extra_keys.items() if position < len(tokens)},
    )
    write_state(path, state, secret)


def load_sequence(
    core: BlockCache, store: KVStore, path: str | os.PathLike[str], *, weights: bytes, salt: bytes, secret: bytes
) -> Sequence:
    """A sequence that holds what a file says; its full blocks can be found like any others.

    Raises:
        BlockRefused: the file is damaged, or of another model, layout or salt.
        CacheFull: no room; nothing was changed.
        OSError: the file cannot be read.
    """
    layout, size = layout_of(core), core.block_size
    state = read_state(path, secret)
    _check_own(state, layout, weights, salt, path)
    length = len(state.tokens)
    groups = _kv_groups(layout)
    for group, first in zip(groups, state.first, strict=True):
        kind, window = layout.groups[group]
        if kind == "state" and first != length - 1:
            raise BlockRefused("foreign", f"{path} has no state behind its last token")
        if kind != "state" and first > first_visible_block(length, window, size) * size:
            raise BlockRefused("foreign", f"{path} lacks tokens that blocks of {size} tokens need; use its block size")
    seq = core.open(state.tokens, salt, extra_keys=state.extra_keys)
    try:
        begin = seq.length // size
        plan = core.plan([seq], [state.tokens[seq.length :]])
        try:
            unwritten = []
            for group, first in zip(groups, state.first, strict=True):
                if layout.groups[group][0] == "state":
                    whole, skip = first // size, 0
                else:
                    whole = max(begin, -(-first // size))
                    skip = whole * size - first
                table = plan.groups[group].block_tables[0, whole : -(-length // size)]
                store.import_blocks(group, table.tolist(), _pack(state, layout, group, skip))
                unwritten.append(whole if whole > begin else 0)
        except BaseException:
            core.rollback(plan)
            raise
        core.commit(plan, unwritten=unwritten)
    except BaseException:
        core.close(seq)
        raise
    core.count_as_cached(seq)
    return seq


def _pack(state: SavedState, layout: BlockLayout, group: int, skip: int) -> NDArray[np.uint8]:
    """The stored entries behind the first ``skip``, as packed blocks; the last one filled up with zeros."""
    arrays = layout.packed(group)
    entries = arrays[0].shape[0]
    count = max(0, -(-(len(state.arrays[arrays[0].layer, arrays[0].name][1]) - skip) // entries))
    packed = np.zeros((count, layout.packed_bytes(group)), np.uint8)
    for array in arrays:
        values = state.arrays[array.layer, array.name][1][skip:]
        rows = np.zeros((count * entries, *array.shape[1:]), array.bits)
        rows[: len(values)] = values.view(array.bits)
        packed_view(packed, array)[...] = rows.reshape(count, *array.shape)
    return packed


def _check_own(state: SavedState, layout: BlockLayout, weights: bytes, salt: bytes, path: object) -> None:
    """Raise unless the file is of this model, layout and salt, and has the tensors and shapes that go with it."""
    for what, mine, theirs in (
        ("layout", _state_digest(layout), state.layout),
        ("model (its weights have another identity)", weights, state.weights),
        ("salt", salt_digest(salt), state.salt),
    ):
        if mine != theirs:
            raise BlockRefused("foreign", f"{path} is of another {what}: {theirs.hex()} where {mine.hex()} is needed")
    groups = _kv_groups(layout)
    expected = {}
    for number, group in enumerate(groups):
        if number < len(state.first):
            for array in layout.packed(group):
                shape = (len(state.tokens) - state.first[number], *array.shape[1:])
                expected[array.layer, array.name] = (array.dtype, shape)
    found = {place: (dtype, values.shape) for place, (dtype, values) in state.arrays.items()}
    if not len(state.tokens) or len(state.first) != len(groups) or found != expected:
        raise BlockRefused("foreign", f"{path} does not hold the tensors of this layout")


def layout_of(core: BlockCache) -> BlockLayout:
    """The layout of a cache that has tensors behind it.

    Raises:
        UsageError: it has none.
    """
    if core.layout is None:
        raise UsageError("this cache has no layout: save and load with an adapter's KVCache")
    return core.layout


def _kv_groups(layout: BlockLayout) -> list[int]:
    return [number for number, (kind, _) in enumerate(layout.groups) if kind != "output"]


def _state_digest(layout: BlockLayout) -> bytes:
    """Of what a token stores, stored outputs and block size apart: neither is in the file."""
    layers = [layer for layer in layout.layers if layer.kind != "output"]
    return BlockLayout(layers, 1, layout.dtype).digest
