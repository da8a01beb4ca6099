"""Resizing while sequences are open: nothing in use is lost, and a store can follow the moves."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from kvcache_core import BlockCache, BlockLayout, CacheFull, InvalidInput, LayerSpec, OutOfMemory
from kvcache_core.store import NumpyStore
from tests.no_memory import no_memory
from tests.numpy_cache import NumpyCache
from tests.reference_decoder import DecoderConfig
from tests.strategies import compute, prompts, snapshot, step


def _layout(size=2):
    return BlockLayout([LayerSpec.attention(1, 1), LayerSpec.attention(1, 1, window=3)], size)


def _write(core, store, seq, tokens):
    """A step whose K is the token and whose V is its position."""
    plan = core.plan([seq], [tokens])
    store.apply_copies(plan)
    for layer in range(2):
        slots = plan.groups[store.layout.group_of(layer)].slots[0]
        store.write(layer, "k", slots, plan.tokens[0].reshape(-1, 1, 1).astype(np.float32))
        store.write(layer, "v", slots, plan.positions[0].reshape(-1, 1, 1).astype(np.float32))
    core.commit(plan)


def _check_content(core, store, seq):
    """Every visible token's arrays lie where the tables say."""
    plan = core.plan([seq], [[0]])
    store.apply_copies(plan)
    for layer in range(2):
        for slot, count, first in plan.groups[store.layout.group_of(layer)].extents[0]:
            slots = np.arange(slot, slot + count)
            old = np.arange(first, first + count) < seq.length
            positions = np.arange(first, first + count)[old]
            assert store.read(layer, "v", slots)[old].ravel().tolist() == positions.tolist()
            assert store.read(layer, "k", slots)[old].ravel().tolist() == [seq.tokens[at] for at in positions]
    core.rollback(plan)


@given(
    st.lists(st.tuples(prompts(max_size=9), st.booleans()), min_size=1, max_size=5),
    st.lists(st.integers(3, 60), min_size=1, max_size=4),
    st.integers(1, 3),
)
def test_content_follows_the_moves(requests, sizes, block_size):
    core = BlockCache(60, layout=_layout(block_size))
    store = NumpyStore(_layout(block_size), 60)
    rows = []
    for prompt, keep in requests:
        seq = core.open(prompt)
        _write(core, store, seq, prompt[seq.num_cached :])
        rows.append(seq)
        if not keep:
            rows.pop().close()
    for size in sizes:
        live = max(group.pool.num_live for group in core.groups)
        try:
            results = core.resize(size)
        except CacheFull:
            assert live > size
            event("refused")
            continue
        store.resize(size, [result.moves for result in results])
        event("moved" if any(result.moves for result in results) else "nothing moved")
        core.check_valid()
        for seq in rows:
            if core.num_blocks > live + 1:
                _check_content(core, store, seq)
    core.resize(60)
    store.resize(60, [{} for _ in core.groups])
    for prompt, _ in requests:
        # What is found after all that is what was written.
        seq = core.open([*prompt, 0])
        _check_content(core, store, seq)
        seq.close()
    core.check_valid()


def test_shrinking_evicts_the_least_recent_and_growing_makes_room():
    core = BlockCache(8, 2)
    compute(core, [1, 1, 1, 1]).close()
    compute(core, [2, 2, 2, 2]).close()
    seq = compute(core, [3, 3, 3, 3])
    results = core.resize(4)
    assert [len(result.evicted) for result in results] == [2]
    assert core.stats().evicted_blocks == 2
    assert core.cached_length([1, 1, 1, 1, 0]) == 0
    assert core.cached_length([2, 2, 2, 2, 0]) == 4
    assert seq.tokens == [3, 3, 3, 3]
    with pytest.raises(CacheFull):
        core.plan([seq], [[3] * 5])
    core.resize(9)
    step(core, seq, [3] * 5)
    assert core.stats().num_blocks == 9
    core.check_valid()


def test_shrinking_takes_what_is_reserved_ahead_before_it_refuses():
    core = BlockCache(20, 2)
    seq = compute(core, [1, 2, 3], max_new_tokens=20)
    assert core.stats().live_blocks > 2
    core.resize(2)
    assert core.stats().live_blocks == 2
    before = snapshot(core)
    with pytest.raises(CacheFull, match="cannot shrink to 1 blocks: 2 of 2"):
        core.resize(1)
    assert snapshot(core) == before
    step(core, seq, [4])
    core.check_valid()


def test_resize_to_the_same_size_changes_nothing():
    core = BlockCache(8, 2)
    compute(core, [1, 2, 3]).close()
    compute(core, [4, 5, 6])
    before = snapshot(core)
    results = core.resize(8)
    assert not results[0].evicted and not results[0].moves
    assert snapshot(core) == before


def test_a_refused_resize_leaves_the_entries_and_an_accepted_one_holds_for_another_layout():
    cache = NumpyCache(DecoderConfig(block_size=2), 8)
    seq = cache.open([1, 2, 3, 4, 5])
    cache.step([seq], [[1, 2, 3, 4, 5]])
    with pytest.raises(CacheFull):
        cache.resize(2)
    with pytest.raises(InvalidInput, match="holds no block"):
        cache.resize(memory=1)
    assert (cache.sites.entries.size, cache.core.num_blocks) == (8, 8)
    seq.close()
    cache.resize(5)
    cache.attach(cache.model, outputs="all")
    assert (cache.sites.entries.size, cache.core.num_blocks) == (5, 5)


@pytest.mark.parametrize("size", [5, 12])
def test_a_resize_without_memory_changes_nothing(size):
    config = DecoderConfig(block_size=2)
    cache = NumpyCache(config, 8)
    row = [3, 1, 4, 1, 5, 9, 2, 6]
    other = cache.open([7, 7, 7])
    cache.step([other], [[7, 7, 7]])
    other.close()
    seq = cache.open(row)
    cache.step([seq], [row[:5]])
    before = snapshot(cache.core)
    for at in range(len(cache.store.arrays)):
        with no_memory(cache.store, at), pytest.raises(OutOfMemory, match=f"no memory for {size} blocks"):
            cache.resize(size)
        assert (snapshot(cache.core), cache.store.num_blocks, cache.sites.entries.size) == (before, 8, 8)
        cache.core.check_valid()
    pool = cache.core.groups[-1].pool
    with mock.patch.object(pool, "fresh", side_effect=MemoryError), pytest.raises(MemoryError):
        cache.resize(size)
    assert (snapshot(cache.core), cache.store.num_blocks, cache.sites.entries.size) == (before, 8, 8)
    plain = cache.model.logits(row)
    np.testing.assert_allclose(cache.step([seq], [row[5:7]])[0], plain[6], rtol=1e-5, atol=1e-5)
    cache.resize(size)
    np.testing.assert_allclose(cache.step([seq], [row[7:]])[0], plain[7], rtol=1e-5, atol=1e-5)
    cache.core.check_valid()
