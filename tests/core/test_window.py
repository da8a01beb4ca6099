"""Sliding windows: blocks go as they leave the window, prefixes are still shared, and rollback does not lose tokens.

Each test here is a bug that another cache had.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from kvcache_core import BlockCache, BlockLayout, InvalidInput, LayerSpec
from tests.strategies import compute, snapshot, step


def _core(windows, block_size=4, num_blocks=64):
    return BlockCache(
        num_blocks, layout=BlockLayout([LayerSpec.attention(1, 1, window=w) for w in windows], block_size)
    )


def _visible(plan, number, row, window):
    """Positions that the plan's extents cover for a row."""
    return [
        position for _, count, first in plan.groups[number].extents[row] for position in range(first, first + count)
    ]


@given(st.integers(1, 12), st.integers(1, 5), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_a_row_holds_its_window_and_no_more(window, size, steps):
    core = _core([window], size)
    seq = core.open([0])
    for count in steps:
        plan = core.plan([seq], [list(range(count))])
        start = seq.length
        assert _visible(plan, 0, 0, window) == list(range(max(0, start - window + 1), start + count))
        core.commit(plan)
        # The next token sees window - 1 tokens before it: they span at most this many blocks.
        assert core.stats().live_blocks <= -(-(window - 1) // size) + 1
        core.check_valid()
    event("longer than the window" if seq.length > window else "inside the window")


@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("window", [1, 4, 5, 8])
def test_exactly_at_the_window_size(window, offset):
    """HF transformers once updated wrongly when the length was exactly the window."""
    core = _core([window])
    length = window + offset
    if not length:
        return
    seq = compute(core, list(range(length)))
    plan = core.plan([seq], [[99]])
    assert _visible(plan, 0, 0, window) == list(range(max(0, length - window + 1), length + 1))
    core.rollback(plan)


def test_many_tokens_per_step_evict_too():
    """mlx-lm once dropped nothing when a step had more than one token."""
    one, many = _core([6], 2), _core([6], 2)
    first, second = one.open([0]), many.open([0])
    for start in range(0, 40, 5):
        for token in range(start, start + 5):
            step(one, first, [token])
        step(many, second, list(range(start, start + 5)))
        assert one.stats().live_blocks == many.stats().live_blocks
    assert first.dropped == second.dropped and first.dropped[0] > 0


def test_a_window_does_not_reach_the_layers_without_one():
    """vLLM once took the window from the group, and full-attention layers lost context silently."""
    core = _core([4, None, 7])
    assert [group.window for group in core.groups] == [None, 4, 7]
    seq = compute(core, list(range(30)))
    plan = core.plan([seq], [[30]])
    assert _visible(plan, 0, 0, None) == list(range(31))
    assert _visible(plan, 1, 0, 4) == list(range(27, 31))
    assert _visible(plan, 2, 0, 7) == list(range(24, 31))
    core.commit(plan)
    assert seq.tables[0].count(0) == 0
    assert [table.count(0) for table in seq.tables[1:]] == [seq.dropped[1], seq.dropped[2]] == [7, 6]


def test_dropped_blocks_become_null_and_the_index_stays_position_over_block_size():
    core = _core([5], 2)
    seq = compute(core, list(range(12)))
    plan = core.plan([seq], [[12]])
    assert plan.block_tables.shape == (1, 7)
    # Token 12 sees 8 .. 12: blocks 4, 5 and 6.
    assert [bool(block) for block in plan.block_tables[0]] == [False] * 4 + [True] * 3
    assert plan.slots[0, 0] // 2 == plan.block_tables[0, 6]


@pytest.mark.parametrize("windows", [[4], [4, None], [6, 3, None]])
def test_prefixes_are_shared_through_windows(windows):
    """mlx-lm, llama.cpp and HF compute the whole prompt again, or switch sharing off."""
    core = _core(windows)
    prompt = list(range(40))
    compute(core, prompt).close()
    seq = core.open([*prompt[:33], 99, 98])
    assert seq.num_cached == 33
    plan = core.plan([seq], [[99, 98]])
    assert all(len(group.copies) == 1 for group in plan.groups)
    core.commit(plan)
    core.check_valid()
    # And while the first one still runs.
    running = compute(core, [*prompt[:20], 7, 7, 7])
    assert core.open([*running.tokens, 1]).num_cached == 23


def test_only_the_last_window_must_be_there():
    core = _core([4], 2, 10)
    compute(core, list(range(20))).close()
    compute(core, [50] * 8).close()
    assert core.stats().evicted_blocks == 4, "blocks that the window had dropped"
    seq = core.open([*range(20), 99])
    assert seq.num_cached == 20
    step(core, seq, [99])
    assert seq.tokens == [*range(20), 99]
    core.check_valid()


@given(st.integers(1, 9), st.integers(1, 4), st.sets(st.integers(0, 9)), st.booleans())
def test_the_longest_head_whose_last_window_is_there(window, size, missing, mixed):
    """Against a naive search over all lengths: each kind answers for itself and the shortest wins."""
    core = _core([window, None] if mixed else [window], size)
    length = 10 * size
    seq = compute(core, list(range(length)))
    nodes = list(seq.nodes)
    seq.close()
    number = 1 if mixed else 0
    gone = set()
    for at in missing:
        block = core._index.block(number, nodes[at])
        core.groups[number].pool.unmark_findable(block)
        core._index.detach(number, block)
        gone.add(at)
    core.check_valid()

    def served(head):
        first = max(0, head - window + 1) // size
        return not any(at in gone for at in range(first, -(-head // size)))

    found = core.open([*range(length), 0]).num_cached
    longest = length
    while not mixed and longest and longest // size - 1 in gone:
        # The last node of a chain lives no longer than its block.
        longest -= size
    full = max(head for head in range(0, longest + 1, size) if served(head))
    assert found == full or (found > full and served(found) and found < full + size)
    event("whole" if found == length else "shortened" if found else "none")


# ---- rollback and truncation ----------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [[4], [4, None]])
@pytest.mark.parametrize("drop", [1, 2, 3, 5, 8, 11])
def test_rejected_tokens_can_be_taken_back_past_a_full_window(windows, drop):
    """HF could not crop a full static window; mlx-swift-lm's trim did nothing and said so to nobody."""
    core = _core(windows)
    seq = compute(core, list(range(30)))
    seq.truncate(30 - drop)
    assert seq.length == 30 - drop and seq.tokens == list(range(30 - drop))
    plan = core.plan([seq], [[99]])
    window_group = len(windows) - 1
    start = seq.length
    assert _visible(plan, window_group, 0, 4) == list(range(start - 3, start + 1))
    assert all(plan.groups[window_group].block_tables[0, (start - 3) // 4 :])
    core.commit(plan)
    assert seq.tokens == [*range(30 - drop), 99]
    core.check_valid()


def test_truncation_that_needs_evicted_tokens_is_refused_and_changes_nothing():
    core = _core([4], 2, 6)
    seq = compute(core, list(range(12)))
    compute(core, [50] * 8)  # evicts what the window has dropped
    before = snapshot(core)
    with pytest.raises(InvalidInput, match=r"truncate .* to 5 tokens.*evicted"):
        seq.truncate(5)
    assert snapshot(core) == before
    step(core, seq, [12])
    assert seq.tokens == list(range(13))
    seq.truncate(0)
    assert seq.tokens == []
    core.check_valid()


def test_a_rolled_back_step_does_not_move_the_window():
    core = _core([4, None], 2)
    seq = compute(core, list(range(9)))
    before = snapshot(core)
    for _ in range(3):
        core.rollback(core.plan([seq], [list(range(20))]))
        assert snapshot(core)["sequences"] == before["sequences"]
    core.check_valid()


@pytest.mark.parametrize("windows", [[3], [3, None]])
def test_speculation_at_every_length_around_the_window(windows):
    """Draft three, keep one, at each length: every step sees exactly its window."""
    core = _core(windows, 2)
    number = len(windows) - 1
    seq = compute(core, [0])
    for _ in range(20):
        length = seq.length
        plan = core.plan([seq], [[1, 2, 3]])
        assert _visible(plan, number, 0, 3) == list(range(max(0, length - 2), length + 3))
        core.commit(plan)
        seq.truncate(length + 1)
        core.check_valid()
    assert seq.length == 21


def test_a_fork_keeps_its_window_when_the_parent_goes_on():
    core = _core([4], 2)
    seq = compute(core, list(range(9)))
    child = seq.fork()
    step(core, seq, list(range(20)))
    seq.close()
    core.clear()
    plan = core.plan([child], [[9]])
    assert _visible(plan, 0, 0, 4) == [6, 7, 8, 9]
    assert np.all(plan.block_tables[0, 3:])
    core.commit(plan)
    core.check_valid()
