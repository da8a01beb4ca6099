"""Prefix match: reuse to the token, of whatever was committed before."""

from __future__ import annotations

import random

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from kvcache_core import BlockCache
from kvcache_core.match import first_visible_block
from tests.strategies import common_head, compute, prompts, snapshot, step


@pytest.fixture
def core():
    return BlockCache(256, 4)


@given(st.lists(st.tuples(prompts(), st.booleans()), min_size=1, max_size=12), prompts(), st.integers(1, 6))
def test_num_cached_is_the_longest_common_head_with_anything_committed(past, prompt, block_size):
    core = BlockCache(512, block_size)
    for tokens, close in past:
        seq = compute(core, tokens)
        if close:
            seq.close()
    expected = min(max(common_head(prompt, tokens) for tokens, _ in past), len(prompt) - 1)
    event("inside a block" if expected % block_size else "at a block's end" if expected else "none")
    assert core.stats().evicted_blocks == 0
    assert core.cached_length(prompt) == expected
    seq = core.open(prompt)
    assert seq.num_cached == seq.length == expected
    assert seq.tokens == prompt[:expected]
    plan = core.plan([seq], [prompt[expected:]])
    # The head of a differing block is copied, not recomputed.
    assert len(plan.copies) == (expected % block_size > 0)
    assert plan.positions[0].tolist() == list(range(expected, len(prompt)))
    core.commit(plan)
    assert seq.tokens == prompt
    core.check_valid()


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_the_last_token_is_never_taken_from_the_cache(core, length):
    prompt = list(range(length))
    for _ in range(3):
        seq = compute(core, prompt)
        seq.close()
    assert seq.num_cached == length - 1
    assert core.open([*prompt, 99]).num_cached == length


def test_hundreds_of_siblings_are_told_apart(core):
    rng = random.Random(0)
    tails = [[rng.randrange(50), rng.randrange(50), rng.randrange(50)] for _ in range(200)]
    for number, tail in enumerate(tails):
        seq = compute(core, [1, 2, 3, 4, *tail])
        if number % 3:
            seq.close()
    assert core.stats().evicted_blocks == 0
    for _ in range(300):
        probe = [rng.randrange(50), rng.randrange(50), rng.randrange(50), 7]
        expected = max(common_head(probe, tail) for tail in tails)
        assert core.cached_length([1, 2, 3, 4, *probe]) == 4 + expected
    for tail in tails:
        assert core.cached_length([1, 2, 3, 4, *tail, 0]) == 7
    core.check_valid()


def test_tokens_of_a_running_sequence_are_found_after_every_step(core):
    seq = core.open([5, 6, 7])
    written: list[int] = []
    for tokens in ([5, 6, 7], [8], [9, 10], [11, 12, 13, 14, 15], [16]):
        step(core, seq, tokens)
        written += tokens
        assert core.cached_length([*written, 0]) == len(written)


def test_a_step_is_found_only_once_it_is_committed(core):
    seq = core.open(list(range(10)))
    plan = core.plan([seq], [list(range(10))])
    assert core.cached_length([*range(10), 0]) == 0
    core.commit(plan)
    assert core.cached_length([*range(10), 0]) == 10
    plan = core.plan([seq], [[10, 11, 12]])
    assert core.cached_length([*range(13), 0]) in (8, 10)
    core.rollback(plan)
    assert core.cached_length([*range(13), 0]) == 10
    core.check_valid()


def test_a_tail_that_a_step_is_writing_is_not_shared(core):
    """Its block may be given back for its twin's when the step ends."""
    first = compute(core, [1, 2, 3])
    plan = core.plan([first], [[4]])
    waiting = core.open([1, 2, 3, 9])
    twin = compute(core, [1, 2, 3, 4, 5])
    other = core.open([1, 2, 3, 8])
    core.commit(plan)
    core.check_valid()
    assert first.tables[0] == twin.tables[0][:1]
    for seq, last in ((waiting, 9), (other, 8)):
        step(core, seq, [1, 2, 3, last][seq.num_cached :])
        assert seq.tokens == [1, 2, 3, last]
        core.check_valid()


def test_closed_partial_tails_and_generated_tokens_are_found(core):
    seq = compute(core, [1, 2, 3, 4, 5])
    for token in (6, 7, 8, 9, 10):
        step(core, seq, [token])
    seq.close()
    assert core.stats().live_blocks == 0
    assert core.cached_length([*range(1, 11), 0]) == 10
    assert core.cached_length([1, 2, 3, 4, 5, 6, 99, 98]) == 6


def test_a_tail_that_a_longer_one_covers_takes_no_room(core):
    compute(core, [1, 2, 3, 4, 5, 6, 7]).close()
    cached = core.stats().cached_blocks
    for length in (5, 6, 7):
        seq = compute(core, list(range(1, length + 1)))
        seq.close()
    assert core.stats().cached_blocks == cached
    core.check_valid()


def test_two_computations_of_one_prompt_end_with_one_copy(core):
    prompt = list(range(11))
    first, second = core.open(prompt), core.open(prompt)
    assert first.num_cached == second.num_cached == 0
    plans = [core.plan([seq], [prompt]) for seq in (first, second)]
    for plan in plans:
        core.commit(plan)
        core.check_valid()
    assert first.tables[0][:2] == second.tables[0][:2]
    pool = core.groups[0].pool
    assert [pool.refs(block) for block in first.tables[0]] == [2, 2, 1]
    assert core.stats().live_blocks == 4
    first.close()
    assert [pool.refs(block) for block in second.tables[0]] == [1, 1, 1]
    second.close()
    # Of the two equal tails one stays.
    assert core.stats().cached_blocks == 3
    core.check_valid()


def test_two_equal_rows_of_one_step_end_with_one_copy(core):
    prompt = list(range(8))
    rows = [core.open(prompt) for _ in range(3)]
    core.commit(core.plan(rows, [prompt] * 3))
    assert len({tuple(seq.tables[0]) for seq in rows}) == 1
    assert core.stats().live_blocks == 2
    core.check_valid()


def test_hits_and_misses_are_counted_once_per_open(core):
    compute(core, list(range(10)))
    before = core.stats()
    core.cached_length(list(range(10)))
    assert core.stats() == before
    core.open([*range(7), 50, 51])
    after = core.stats()
    assert after.hit_tokens - before.hit_tokens == 7
    assert after.miss_tokens - before.miss_tokens == 2
    assert after.hit_ratio == 7 / 19


def test_looking_changes_nothing(core):
    compute(core, list(range(10))).close()
    before = snapshot(core)
    core.cached_length(list(range(9)))
    core.cached_length([9], b"salt")
    assert snapshot(core) == before


def test_looking_does_not_make_a_block_recently_used():
    core = BlockCache(4, 2)
    compute(core, [1, 1]).close()
    compute(core, [2, 2]).close()
    core.cached_length([1, 1, 0])
    compute(core, [3, 3, 3, 3, 3, 3])
    assert core.cached_length([1, 1, 0]) == 0
    assert core.cached_length([2, 2, 0]) == 2


@given(st.integers(0, 200), st.one_of(st.none(), st.integers(1, 40)), st.integers(1, 9))
def test_first_visible_block(position, window, size):
    first = first_visible_block(position, window, size)
    visible = range(position + 1) if window is None else range(max(0, position - window + 1), position + 1)
    assert first == visible[0] // size


# ---- eviction -----------------------------------------------------------------------------------------


def test_eviction_is_least_recently_used_sequence_first_and_tail_first():
    core = BlockCache(8, 1)
    compute(core, [1, 2, 3]).close()
    compute(core, [11, 12, 13]).close()
    core.open([1, 2, 3, 4]).close()  # used again: now the most recent
    order = []
    for extra in range(1, 9):
        seq = compute(core, [100 * extra])
        order.append((core.cached_length([1, 2, 3, 0]), core.cached_length([11, 12, 13, 0])))
    assert seq.length == 1
    assert order == [(3, 3), (3, 3), (3, 2), (3, 1), (3, 0), (2, 0), (1, 0), (0, 0)]
    assert core.stats().evicted_blocks == 6


def test_a_shared_head_outlives_the_tails():
    core = BlockCache(6, 2)
    first = compute(core, [1, 2, 3, 4, 5, 6])
    second = compute(core, [1, 2, 3, 4, 7, 8])
    first.close()
    second.close()
    compute(core, [50] * 6)
    assert core.stats().evicted_blocks == 1
    assert core.cached_length([1, 2, 3, 4, 5, 6, 0]) == 4
    assert core.cached_length([1, 2, 3, 4, 7, 8, 0]) == 6


@given(
    st.lists(st.tuples(prompts(vocab=2, max_size=8), st.booleans()), min_size=3, max_size=25),
    st.integers(4, 10),
)
def test_eviction_against_a_naive_lru_of_prefixes(requests, num_blocks):
    """With blocks of one token a block is a prefix: the oracle is a list of prefixes in order of use."""
    core = BlockCache(num_blocks, 1)
    recent: list[tuple[int, ...]] = []  # least recently used first
    evicted = 0
    for prompt, _ in requests:
        prefixes = [tuple(prompt[: end + 1]) for end in range(len(prompt))]
        expected = 0
        while expected < len(prompt) - 1 and prefixes[expected] in recent:
            expected += 1
        seq = core.open(prompt)
        assert seq.num_cached == expected
        if len(prompt) > num_blocks:
            seq.close()
            for prefix in reversed(prefixes[:expected]):
                recent.remove(prefix)
                recent.append(prefix)
            continue
        held = prefixes[:expected]
        others = [prefix for prefix in recent if prefix not in held]
        surplus = max(0, len(held) + len(others) + len(prompt) - expected - num_blocks)
        evicted += surplus
        others = others[surplus:]
        step(core, seq, prompt[expected:])
        seq.close()
        recent = [prefix for prefix in others if prefix not in prefixes] + prefixes[::-1]
        assert core.stats().evicted_blocks == evicted
        assert core.stats().cached_blocks == len(recent)
        core.check_valid()
    event("evicted" if evicted else "nothing evicted")


def test_a_full_pool_writes_into_a_cached_tail_that_only_the_row_holds():
    core = BlockCache(2, 4)
    compute(core, [1, 2, 3, 4, 5, 6]).close()
    seq = core.open([1, 2, 3, 4, 5, 9, 9])
    assert seq.num_cached == 5
    plan = core.plan([seq], [[9, 9]])
    assert len(plan.copies) == 0
    core.commit(plan)
    assert seq.tokens == [1, 2, 3, 4, 5, 9, 9]
    assert core.cached_length([1, 2, 3, 4, 5, 6, 0]) == 5
    assert core.stats().evicted_blocks == 1
    core.check_valid()
    seq.close()
    core.check_valid()


def test_a_full_pool_writes_into_a_published_block_that_only_the_row_holds():
    core = BlockCache(2, 4)
    seq = compute(core, [1, 2, 3, 4, 5, 6, 7, 8])
    seq.truncate(6)
    plan = core.plan([seq], [[9]])
    assert len(plan.copies) == 0
    core.rollback(plan)
    assert seq.tokens == [1, 2, 3, 4, 5, 6]
    step(core, seq, [9, 10])
    assert seq.tokens == [1, 2, 3, 4, 5, 6, 9, 10]
    assert core.cached_length([1, 2, 3, 4, 5, 6, 7, 8, 0]) == 6
    core.check_valid()
