"""The block pool: reference counts, LRU order, adjacency, errors."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from kvcache_core import BlockError, CacheFull, InvalidInput
from kvcache_core.pool import BlockPool
from kvcache_core.types import id_array


def _cached(pool, count):
    """Take blocks, make them findable and let go of them."""
    taken, _ = pool.take(count)
    for block in taken:
        pool.mark_findable(block)
    pool.release(taken)
    return taken


def test_a_new_pool_is_free_and_hands_out_adjacent_blocks_from_one():
    pool = BlockPool(6)
    assert (pool.num_free, pool.num_cached, pool.num_live) == (6, 0, 0)
    assert pool.take(4) == ([1, 2, 3, 4], [])
    assert (pool.num_free, pool.num_cached, pool.num_live) == (2, 0, 4)


@pytest.mark.parametrize("size", [0, -1, 2.0, "4", None, True])
def test_a_pool_needs_a_whole_number_of_blocks(size):
    with pytest.raises(InvalidInput, match="at least 1"):
        BlockPool(size)
    pool = BlockPool(3)
    with pytest.raises(InvalidInput, match="at least 1"):
        pool.resize(size)
    pool.check_valid()
    assert pool.num_blocks == 3


def test_the_block_behind_comes_first():
    pool = BlockPool(8)
    first, _ = pool.take(2)
    other, _ = pool.take(1)
    pool.release(other)
    assert pool.take(3, after=first[-1])[0] == [3, 4, 5]


def test_a_run_that_holds_all_comes_before_pieces():
    pool = BlockPool(12)
    taken, _ = pool.take(12)
    pool.release(taken[:2])
    pool.release(taken[4:5])
    pool.release(taken[7:11])
    assert pool.take(4)[0] == [8, 9, 10, 11]
    assert pool.take(3)[0] == [1, 2, 5]
    pool.check_valid()


def test_rows_that_take_equally_many_lie_equally_spaced():
    pool = BlockPool(40)
    rows = [pool.take(5)[0] for _ in range(4)]
    assert [row[0] for row in rows] == [1, 6, 11, 16]
    assert all(row == list(range(row[0], row[0] + 5)) for row in rows)


def test_a_recycled_pool_hands_out_adjacent_blocks_again():
    pool = BlockPool(8)
    taken, _ = pool.take(8)
    pool.release(taken)  # enters the free queue tail first
    again = pool.take(5)[0]
    assert again == list(range(again[0], again[0] + 5))
    pool = BlockPool(8)
    _cached(pool, 8)
    taken, evicted = pool.take(4)
    assert taken == [5, 6, 7, 8] == sorted(evicted)


def test_tail_is_evicted_before_head_and_older_before_newer():
    pool = BlockPool(6)
    first, _ = pool.take(3)
    second, _ = pool.take(3)
    for block in first + second:
        pool.mark_findable(block)
    pool.release(second)
    pool.release(first)
    evicted = [pool.take(1)[1][0] for _ in range(6)]
    assert evicted == [6, 5, 4, 3, 2, 1]


def test_retaining_a_cached_block_takes_it_out_of_the_order():
    pool = BlockPool(3)
    first, second, third = (_cached(pool, 1)[0] for _ in range(3))
    pool.retain([first])
    pool.release([first])
    assert pool.lru_order() == [second, third, first]
    pool.retain([second])
    assert pool.take(2)[1] == [third, first]
    with pytest.raises(CacheFull):
        pool.take(1)


def test_free_blocks_go_before_cached_ones():
    pool = BlockPool(4)
    _cached(pool, 2)
    assert pool.take(2) == ([3, 4], [])
    assert pool.take(1)[1] == [2]


def test_unfindable_blocks_become_free_and_findable_ones_cached():
    pool = BlockPool(3)
    taken, _ = pool.take(2)
    pool.mark_findable(taken[0])
    pool.release(taken)
    assert (pool.num_free, pool.num_cached) == (2, 1)
    pool.unmark_findable(taken[0])
    assert (pool.num_free, pool.num_cached) == (3, 0)
    pool.check_valid()


def test_shared_blocks_stay_until_the_last_reference_goes():
    pool = BlockPool(2)
    taken, _ = pool.take(1)
    pool.retain(taken)
    pool.release(taken)
    assert pool.num_live == 1
    pool.release(taken)
    assert pool.num_free == 2


@pytest.mark.parametrize("bad", [3, 99, -1])
def test_double_release_unknown_id_and_use_after_free_change_nothing(bad):
    pool = BlockPool(4)
    taken, _ = pool.take(2)
    state = [pool.refs(block) for block in range(1, 5)]
    with pytest.raises(BlockError, match=str(bad)):
        pool.release([*taken, bad])
    with pytest.raises(BlockError, match=str(bad)):
        pool.retain([*taken, bad])
    assert state == [pool.refs(block) for block in range(1, 5)]
    pool.check_valid()


def test_releasing_more_often_than_retained_names_the_block_and_changes_nothing():
    pool = BlockPool(4)
    taken, _ = pool.take(3)
    with pytest.raises(BlockError, match="block 2 was released more often"):
        pool.release([1, 2, 2, 3])
    assert [pool.refs(block) for block in taken] == [1, 1, 1]
    pool.release(taken)
    with pytest.raises(BlockError, match="released more often"):
        pool.release(taken)
    with pytest.raises(BlockError, match="free"):
        pool.retain([taken[0]])
    with pytest.raises(BlockError, match="not live"):
        pool.mark_findable(taken[0])


def test_a_table_holds_a_block_once():
    pool = BlockPool(4)
    taken, _ = pool.take(3)
    pool.retain(taken)
    for call, verb in ((pool.release, "released"), (pool.retain, "retained")):
        with pytest.raises(BlockError, match=f"block 2 was {verb} more often than a table holds it"):
            call([1, 2, 0, 0, 3, 2])
    assert [pool.refs(block) for block in taken] == [2, 2, 2]
    pool.check_valid()


def test_null_blocks_are_skipped():
    pool = BlockPool(2)
    taken, _ = pool.take(1)
    pool.retain([0, taken[0], 0])
    pool.release([0, taken[0], 0])
    assert pool.refs(taken[0]) == 1
    with pytest.raises(BlockError):
        pool.refs(0)


def test_out_of_room_has_the_numbers_and_changes_nothing():
    pool = BlockPool(5)
    pool.take(2)
    _cached(pool, 1)
    with pytest.raises(CacheFull, match=r"need 4 blocks, 2 free \+ 1 evictable of 5") as caught:
        pool.take(4)
    assert (caught.value.needed, caught.value.available, caught.value.capacity) == (4, 3, 5)
    assert (pool.num_free, pool.num_cached, pool.num_live) == (2, 1, 2)
    pool.check_valid()


def test_drop_cached_frees_all_but_live_blocks():
    pool = BlockPool(5)
    live, _ = pool.take(1)
    cached = _cached(pool, 3)
    assert sorted(pool.drop_cached()) == cached
    assert (pool.num_free, pool.num_cached, pool.num_live) == (4, 0, 1)
    assert pool.refs(live[0]) == 1


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_filling_is_taking_marking_and_releasing(count):
    def holed():
        """Two blocks held, two cached, five free in two runs."""
        pool = BlockPool(9)
        taken = pool.take(6)[0]
        pool.mark_all_findable(id_array(taken[:2]))
        pool.release(taken[:2])
        pool.release([taken[3], taken[4]])
        return pool

    filled, stepwise = holed(), holed()
    blocks = filled.fill(count)
    taken = stepwise.take(count)[0]
    stepwise.mark_all_findable(id_array(taken))
    stepwise.release(taken[::-1])
    for pool in (filled, stepwise):
        pool.check_valid()
    assert sorted(blocks) == sorted(taken) and filled.lru_order()[2:] == blocks
    assert filled.lru_order()[:2] == stepwise.lru_order()[:2]
    assert (filled.num_free, filled.num_cached, filled.num_live) == (5 - count, 2 + count, 2)


def test_the_release_queue_does_not_grow_with_use():
    pool = BlockPool(4)
    taken = _cached(pool, 4)
    for _ in range(5000):
        pool.retain(taken)
        pool.release(taken)
    assert len(pool.lru._entries) <= 2 * 4 + 65
    assert pool.lru_order() == taken[::-1]
    pool.check_valid()


class _NaivePool:
    """The LRU rule in a dictionary: references, findable flags, and an ordered set of cached blocks."""

    def __init__(self, size):
        self.refs = dict.fromkeys(range(1, size + 1), 0)
        self.findable = set()
        self.cached = OrderedDict()
        self.size = size

    @property
    def free(self):
        return {b for b, refs in self.refs.items() if not refs and b not in self.findable}

    def take(self, taken, evicted):
        expected = [self.cached.popitem(last=False)[0] for _ in range(len(taken) - len(self.free))]
        assert evicted == expected, "not the least recently used blocks"
        self.findable -= set(evicted)
        assert set(taken) <= self.free
        for block in taken:
            self.refs[block] = 1

    def release(self, blocks):
        for block in blocks:
            self.refs[block] -= 1
        for block in reversed(blocks):
            if not self.refs[block] and block in self.findable:
                self.cached[block] = None

    def retain(self, blocks):
        for block in blocks:
            self.refs[block] += 1
            self.cached.pop(block, None)


@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 40), st.integers(1, 4)), max_size=60),
)
def test_eviction_follows_a_naive_lru(size, actions):
    pool, naive = BlockPool(size), _NaivePool(size)
    held: list[list[int]] = []
    for kind, pick, count in actions:
        if kind <= 1:
            if count > pool.num_available:
                with pytest.raises(CacheFull):
                    pool.take(count)
                continue
            taken, evicted = pool.take(count)
            event("evicted", payload=bool(evicted))
            naive.take(taken, evicted)
            held.append(taken)
            for block in taken[: pick % (count + 1)]:
                pool.mark_findable(block)
                naive.findable.add(block)
        elif kind == 2 and naive.cached:
            blocks = list(naive.cached)[: 1 + pick % 3]
            pool.retain(blocks)
            naive.retain(blocks)
            held.append(blocks)
        elif kind == 6 and naive.cached:
            blocks = list(naive.cached)[pick % len(naive.cached) :: count]
            pool.use(blocks)
            naive.retain(blocks)
            naive.release(blocks)
        elif kind == 3 and held:
            blocks = held[pick % len(held)]
            pool.retain(blocks)
            naive.retain(blocks)
            held.append(list(blocks))
        elif held:
            blocks = held.pop(pick % len(held))
            pool.release(blocks)
            naive.release(blocks)
        pool.check_valid()
        assert [pool.refs(b) for b in naive.refs] == list(naive.refs.values())
        assert pool.lru_order() == list(naive.cached)
        assert pool.num_free == len(naive.free)
        assert pool.num_free + pool.num_cached + pool.num_live == size


def test_resize_keeps_live_blocks_and_lru_order():
    pool = BlockPool(10)
    cached = _cached(pool, 6)
    pool.retain([cached[5]])
    live, _ = pool.take(2)
    order = pool.lru_order()
    result = pool.resize(5)
    assert result.evicted == order[:3]
    assert sorted(result.moves) == sorted(block for block in [*live, cached[5]] if block > 5)
    renamed = [result.moves.get(block, block) for block in order[3:]]
    assert pool.lru_order() == renamed
    assert (pool.num_free, pool.num_cached, pool.num_live) == (0, 2, 3)
    pool.check_valid()
    pool.resize(8)
    assert (pool.num_free, pool.num_cached, pool.num_live) == (3, 2, 3)
    assert pool.lru_order() == renamed
    assert pool.take(3) == ([6, 7, 8], [])
    pool.check_valid()


def test_resize_below_the_live_blocks_is_refused():
    pool = BlockPool(6)
    pool.take(4)
    with pytest.raises(CacheFull, match="cannot shrink to 3 blocks: 4 of 6 are live") as caught:
        pool.resize(3)
    assert (caught.value.needed, caught.value.available, caught.value.capacity) == (4, 3, 6)
    assert pool.num_blocks == 6
    pool.check_valid()
