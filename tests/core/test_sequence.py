"""Sequences: open, step, fork, truncate, close; adjacency of their blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache_core import BlockCache
from tests.strategies import compute, snapshot, step


@pytest.fixture
def core():
    return BlockCache(32, 4)


def _extents(core, seq):
    plan = core.plan([seq], [[0]])
    core.rollback(plan)
    return len(plan.groups[0].extents[0])


def test_a_new_sequence_holds_only_what_is_cached(core):
    seq = core.open([1, 2, 3])
    assert (seq.length, seq.num_cached, seq.tokens, seq.closed) == (0, 0, [], False)
    assert core.stats().live_blocks == 0
    assert "length=0" in repr(seq)
    step(core, seq, [1, 2, 3])
    assert len(seq) == 3
    seq.close()
    assert seq.closed and "closed" in repr(seq)


def test_rollback_gives_back_blocks_and_the_copied_tail(core):
    compute(core, [1, 2, 3, 4, 5, 6]).close()
    seq = core.open([1, 2, 3, 4, 5, 9])
    before = snapshot(core)
    for tokens in ([9], [9] * 30):
        plan = core.plan([seq], [tokens])
        assert len(plan.copies) == 1
        core.rollback(plan)
        after = snapshot(core)
        assert after["sequences"] == before["sequences"]
        assert after["nodes"] == before["nodes"]
        assert after["pools"] == before["pools"]
    step(core, seq, [9])
    assert seq.tokens == [1, 2, 3, 4, 5, 9]


def test_rollback_of_a_first_step_leaves_an_empty_sequence(core):
    seq = core.open([1, 2, 3, 4, 5])
    before = snapshot(core)
    core.rollback(core.plan([seq], [[1, 2, 3, 4, 5]]))
    assert snapshot(core) == before
    assert core.cached_length([1, 2, 3, 4, 5]) == 0


def test_rollback_evicts_no_less_than_plan_did_but_finds_nothing_new():
    core = BlockCache(3, 2)
    compute(core, [1, 2, 3, 4]).close()
    seq = core.open([9, 9, 9, 9])
    plan = core.plan([seq], [[9, 9, 9, 9]])
    core.rollback(plan)
    # Evicted is evicted: the block that the step took is free now.
    stats = core.stats()
    assert (stats.free_blocks, stats.cached_blocks, stats.live_blocks) == (2, 1, 0)
    assert core.cached_length([1, 2, 3, 4, 0]) == 2
    core.check_valid()


def test_fork_copies_nothing_until_one_of_the_two_writes(core):
    seq = compute(core, [1, 2, 3, 4, 5, 6])
    live = core.stats().live_blocks
    child = seq.fork()
    assert core.stats().live_blocks == live
    assert (child.tokens, child.length, child.num_cached) == (seq.tokens, seq.length, seq.num_cached)
    plan = core.plan([child], [[7]])
    assert plan.copies.tolist() == [[seq.tables[0][1], child.tables[0][1]]]
    core.commit(plan)
    plan = core.plan([seq], [[8]])
    assert len(plan.copies) == 0, "the last holder writes in place"
    core.commit(plan)
    assert child.tokens == [1, 2, 3, 4, 5, 6, 7] and seq.tokens == [1, 2, 3, 4, 5, 6, 8]
    assert child.tables[0][0] == seq.tables[0][0]
    core.check_valid()


def test_fork_at_a_block_end_needs_no_copy(core):
    seq = compute(core, [1, 2, 3, 4])
    child = seq.fork()
    plan = core.plan([seq, child], [[5], [6]])
    assert len(plan.copies) == 0
    core.commit(plan)
    core.check_valid()


def test_forks_that_step_together_each_get_their_tail(core):
    seq = compute(core, [1, 2, 3, 4, 5])
    rows = [seq] + [seq.fork() for _ in range(3)]
    core.commit(core.plan(rows, [[10 + row] for row in range(4)]))
    assert [row.tokens[-1] for row in rows] == [10, 11, 12, 13]
    assert len({row.tables[0][1] for row in rows}) == 4
    assert core.cached_length([1, 2, 3, 4, 5, 0]) == 5
    core.check_valid()
    for row in rows:
        row.close()
    assert core.stats().live_blocks == 0
    core.check_valid()


def test_the_parent_may_close_before_the_child(core):
    seq = compute(core, [1, 2, 3, 4, 5, 6])
    child = seq.fork()
    grandchild = child.fork()
    seq.close()
    child.close()
    step(core, grandchild, [7, 8, 9])
    assert grandchild.tokens == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    grandchild.close()
    assert core.stats().open_sequences == 0
    core.check_valid()


def test_an_empty_sequence_can_be_forked(core):
    child = core.open([1, 2]).fork()
    step(core, child, [1, 2])
    assert child.tokens == [1, 2]
    core.check_valid()


@pytest.mark.parametrize("length", range(11))
def test_truncate_then_go_on(core, length):
    seq = compute(core, list(range(10)))
    seq.truncate(length)
    assert seq.tokens == list(range(length))
    assert core.stats().live_blocks == -(-length // 4)
    core.check_valid()
    step(core, seq, [90, 91, 92, 93, 94])
    assert seq.tokens == [*range(length), 90, 91, 92, 93, 94]
    assert core.cached_length([*seq.tokens, 0]) == length + 5
    core.check_valid()


def test_truncate_does_not_lose_what_another_sequence_reads(core):
    seq = compute(core, list(range(7)))
    child = seq.fork()
    seq.truncate(5)
    plan = core.plan([seq], [[50]])
    assert len(plan.copies) == 1
    core.commit(plan)
    assert child.tokens == list(range(7))
    step(core, child, [7])
    assert core.cached_length([*range(8), 0]) == 8
    core.check_valid()


def test_a_truncated_published_block_is_copied_and_stays_found(core):
    seq = compute(core, list(range(8)))
    seq.truncate(6)
    plan = core.plan([seq], [[60, 61]])
    assert len(plan.copies) == 1
    core.commit(plan)
    assert core.cached_length([*range(8), 0]) == 8
    assert core.cached_length([0, 1, 2, 3, 4, 5, 60, 61, 0]) == 8
    core.check_valid()


def test_rejected_tokens_are_not_found_under_the_accepted_ones(core):
    """A speculative step of four tokens, one accepted: what is written next replaces the others."""
    seq = compute(core, [1, 2, 3, 4, 5])
    for _ in range(6):
        length = seq.length
        step(core, seq, [100, 101, 102, 103])
        seq.truncate(length + 1)
        step(core, seq, [7])
        assert seq.tokens[length:] == [100, 7]
        assert core.cached_length([*seq.tokens, 0]) == seq.length
        core.check_valid()


def test_truncate_to_the_same_length_changes_nothing(core):
    seq = compute(core, [1, 2, 3, 4, 5])
    before = snapshot(core)
    seq.truncate(5)
    assert snapshot(core) == before


def test_truncate_lowers_num_cached(core):
    compute(core, list(range(10)))
    seq = core.open(list(range(10)))
    assert seq.num_cached == 9
    seq.truncate(4)
    assert seq.num_cached == 4


def test_close_returns_everything_and_keeps_it_findable(core):
    seq = compute(core, list(range(10)), max_new_tokens=8)
    seq.close()
    stats = core.stats()
    assert (stats.live_blocks, stats.cached_blocks, stats.open_sequences) == (0, 3, 0)
    assert core.cached_length([*range(10), 0]) == 10


def test_clear_leaves_open_sequences_alone(core):
    compute(core, [9, 8, 7, 6, 5]).close()
    seq = compute(core, [1, 2, 3, 4, 5])
    core.clear()
    assert core.stats().cached_blocks == 0
    assert core.cached_length([9, 8, 7, 6, 5]) == 0
    assert core.cached_length([1, 2, 3, 4, 5, 6]) == 5
    step(core, seq, [6])
    core.check_valid()


# ---- adjacency ----------------------------------------------------------------------------------------


def test_a_prompt_lies_in_one_extent(core):
    seq = compute(core, list(range(50)))
    assert _extents(core, seq) == 1


def test_a_single_sequence_stays_in_one_extent_while_it_grows(core):
    seq = compute(core, [1])
    for token in range(60):
        step(core, seq, [token])
    assert _extents(core, seq) == 1


def test_room_reserved_ahead_keeps_two_growing_sequences_apart(core):
    rows = [compute(core, [row] * 5, max_new_tokens=30) for row in range(3)]
    for token in range(30):
        core.commit(core.plan(rows, [[token]] * 3))
    for seq in rows:
        table = seq.tables[0]
        assert table == list(range(table[0], table[0] + len(table)))
    core.check_valid()


def test_the_block_behind_is_used_again_after_another_sequence_left(core):
    first = compute(core, list(range(8)))
    second = compute(core, [50, 51])
    assert second.tables[0] == [first.tables[0][-1] + 1]
    second.close()
    core.clear()
    step(core, first, [8, 9])
    assert _extents(core, first) == 1


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.booleans())
def test_a_pool_that_was_used_before_gives_one_extent_again(lengths, clear):
    """Evicted or cleared, the blocks come back adjacent, however the pool was cut up before."""
    core = BlockCache(16, 2)
    rows = [compute(core, [row] * length) for row, length in enumerate(lengths) if sum(lengths[: row + 1]) <= 20]
    for seq in rows:
        seq.close()
    if clear:
        core.clear()
    seq = compute(core, [99] * 31)
    assert _extents(core, seq) == 1


def test_a_reservation_ahead_is_given_to_whoever_needs_it(core):
    seq = compute(core, [1, 2], max_new_tokens=100)
    assert core.stats().live_blocks == 26
    other = compute(core, [3] * 100)
    assert other.length == 100
    assert core.stats().live_blocks == 26
    step(core, seq, [5] * 8)
    core.check_valid()


def test_a_reservation_that_does_not_fit_is_not_made(core):
    seq = compute(core, [1, 2], max_new_tokens=1000)
    assert core.stats().live_blocks == 1
    seq.close()
    core.check_valid()
