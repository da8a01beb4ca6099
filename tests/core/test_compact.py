"""Compaction: the blocks of open sequences come together, and every byte can follow."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from kvcache_core import BlockCache, OutOfMemory, StepError
from kvcache_core.placement import count_extents
from kvcache_core.store import NumpyStore
from tests.core.test_resize import _check_content, _layout, _write
from tests.numpy_cache import NumpyCache
from tests.reference_decoder import DecoderConfig
from tests.strategies import compute, prompts, snapshot, step


def _follow(core, store):
    results = core.compact()
    for number, result in enumerate(results):
        assert not result.evicted
        store.copy_blocks(number, np.array(list(result.moves.items()), np.int64).reshape(-1, 2))
    return results


@given(
    st.lists(st.tuples(st.integers(0, 3), prompts(max_size=9), st.integers(0, 6)), min_size=1, max_size=14),
    st.integers(1, 3),
)
def test_content_follows_and_extents_get_fewer(history, block_size):
    core = BlockCache(70, layout=_layout(block_size))
    store = NumpyStore(_layout(block_size), 70)
    rows, told = [], []
    for kind, tokens, pick in history:
        if kind == 0 or not rows:
            seq = core.open(tokens, max_new_tokens=pick)
            _write(core, store, seq, tokens[seq.num_cached :])
            rows.append(seq)
            told.append(tokens)
        elif kind == 1:
            _write(core, store, rows[pick % len(rows)], tokens)
        elif kind == 2:
            rows.append(rows[pick % len(rows)].fork())
        else:
            rows.pop(pick % len(rows)).close()
    before, found = snapshot(core), [core.cached_length([*tokens, 9]) for tokens in told]
    extents = [sum(count_extents(seq.tables[number]) for seq in rows) for number in range(2)]
    results = _follow(core, store)
    core.check_valid()
    after = snapshot(core)
    assert after["stats"] == before["stats"]
    assert [core.cached_length([*tokens, 9]) for tokens in told] == found
    for number, result in enumerate(results):
        now = sum(count_extents(seq.tables[number]) for seq in rows)
        assert now < extents[number] if result.moves else now == extents[number]
        names = lambda blocks, moves=result.moves: [moves.get(block, block) for block in blocks]  # noqa: E731
        assert after["pools"][number]["lru"] == names(before["pools"][number]["lru"])
    event("moved" if any(result.moves for result in results) else "nothing to gain")
    for seq in rows:
        _check_content(core, store, seq)
    assert not any(result.moves for result in core.compact()), "a second time there is nothing to gain"
    for tokens in told:
        # What is found after all that is what was written.
        seq = core.open([*tokens, 0])
        _check_content(core, store, seq)
        seq.close()


def test_two_sequences_that_grew_in_turns_lie_in_one_extent_each():
    core = BlockCache(20, 1)
    rows = [core.open([row]) for row in range(3)]
    for token in range(4):
        for row, seq in enumerate(rows):
            step(core, seq, [10 * row + token])
    assert [count_extents(seq.tables[0]) for seq in rows] == [4, 4, 4]
    core.compact()
    assert [count_extents(seq.tables[0]) for seq in rows] == [1, 1, 1]
    assert [seq.tables[0][0] for seq in rows] == [1, 7, 13], "with room to grow between them"
    for token in range(4, 6):
        for row, seq in enumerate(rows):
            step(core, seq, [10 * row + token])
    assert [count_extents(seq.tables[0]) for seq in rows] == [1, 1, 1]
    assert [seq.tokens for seq in rows] == [[10 * row + token for token in range(6)] for row in range(3)]
    core.check_valid()


def test_cached_blocks_that_are_in_the_way_are_moved_and_found():
    core = BlockCache(12, 1)
    done = compute(core, [1, 2, 3])
    rows = [core.open([20]), core.open([30])]
    for token in range(2):
        for row, seq in enumerate(rows):
            step(core, seq, [20 + 10 * row + token])
    done.close()
    moves = core.compact()[0].moves
    assert {1, 2, 3} <= set(moves)
    assert core.cached_length([1, 2, 3, 0]) == 3
    compute(core, list(range(40, 46)))
    assert core.cached_length([1, 2, 3, 0]) == 2, "the tail goes first, as before"
    core.check_valid()


def test_nothing_moves_during_a_step():
    core = BlockCache(12, 2)
    seq = compute(core, [1, 2, 3])
    plan = core.plan([seq], [[4]])
    with pytest.raises(StepError, match="cannot compact during a step"):
        core.compact()
    core.commit(plan)
    assert core.compact()[0].moves == {}


def _in_turns(cache):
    """Two sequences that grew in turns, and the tokens that each still gets."""
    rows = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2]]
    seqs = [cache.open(row) for row in rows]
    for at in range(7):
        cache.step(seqs, [row[at : at + 1] for row in rows])
    return seqs, rows


def _goes_on(cache, seqs, rows, at):
    found = cache.step(seqs, [row[at : at + 1] for row in rows])
    for logits, row in zip(found, rows, strict=True):
        np.testing.assert_allclose(logits, cache.model.logits(row)[at], rtol=1e-5, atol=1e-5)
    cache.core.check_valid()


@pytest.mark.parametrize("part", ["content", "pool"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_compaction_without_memory_changes_nothing(part, number):
    cache = NumpyCache(DecoderConfig(block_size=1, windows=(None, 4)), 40)
    seqs, rows = _in_turns(cache)
    before, arrays = snapshot(cache.core), {key: array.copy() for key, array in cache.store.arrays.items()}
    place, name = (cache.store, "export_blocks") if part == "content" else (cache.core.groups[number].pool, "fresh")
    whole = getattr(place, name)

    def fail(*args):
        if part == "pool" or args[0] == number:
            raise MemoryError
        return whole(*args)

    error = OutOfMemory if part == "content" else MemoryError
    with mock.patch.object(place, name, fail), pytest.raises(error):
        cache.compact()
    assert snapshot(cache.core) == before
    assert all(np.array_equal(array, arrays[key], equal_nan=True) for key, array in cache.store.arrays.items())
    _goes_on(cache, seqs, rows, 7)
    assert cache.compact() > 0
    _goes_on(cache, seqs, rows, 8)
