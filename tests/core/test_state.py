"""State layers: one state per block, behind the block's last token."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from kvcache_core import BlockCache, BlockLayout, CacheFull, InvalidInput, LayerSpec
from kvcache_core.decoder import CacheDecoder
from kvcache_core.frames import frames_of, padded
from kvcache_core.layout import STATE_WINDOW
from tests.strategies import compute, snapshot, step

LAYOUT = BlockLayout([LayerSpec.attention(1, 2), LayerSpec.state(3, 8)], 4)


def core_of(blocks: int = 40) -> BlockCache:
    return BlockCache(blocks, layout=LAYOUT)


def test_a_state_takes_bytes_per_block_and_none_per_token():
    assert (LAYOUT.bytes_per_token, LAYOUT.bytes_per_block) == (16, 4 * 16 + 4 * 24)
    assert LAYOUT.groups == (("attention", None), ("state", STATE_WINDOW))
    assert LAYOUT.packed(1)[0].shape == (1, 3, 8)
    assert LAYOUT.digest != BlockLayout([LAYOUT.layers[0], LayerSpec.state(3, 7)], 4).digest


def test_a_state_layer_has_the_window_of_a_state():
    with pytest.raises(InvalidInput, match=r"use LayerSpec\.state"):
        LayerSpec(LAYOUT.layers[1].arrays, window=3, kind="state")


def test_a_step_reads_one_state_and_writes_one_per_block_and_one_behind_its_last_token():
    core = core_of()
    seq = core.open(range(30))
    plan = core.plan([seq], [range(6)])
    assert plan.groups[1].state_reads.tolist() == [0]
    assert plan.groups[1].state_writes.tolist() == [[0, 4, 1], [0, 6, 2]]
    core.commit(plan)
    plan = core.plan([seq], [range(6, 13)])
    assert plan.groups[1].state_reads.tolist() == [2]
    assert [(row, end) for row, end, _ in plan.groups[1].state_writes.tolist()] == [(0, 2), (0, 6), (0, 7)]
    assert 2 not in plan.groups[1].state_writes[:, 2]
    assert not len(plan.groups[0].copies)
    core.commit(plan)


def test_a_step_that_is_rolled_back_has_touched_no_state_that_is_needed():
    core = core_of()
    seq = compute(core, list(range(6)))
    before = snapshot(core)
    plan = core.plan([seq], [[7, 8]])
    needed, written = plan.groups[1].state_reads.tolist(), plan.groups[1].state_writes[:, 2].tolist()
    core.rollback(plan)
    assert snapshot(core) == before
    assert not set(needed) & set(written)
    assert core.plan([seq], [[7, 8]]).groups[1].state_reads.tolist() == needed


def test_truncation_goes_to_the_end_of_a_block():
    core = core_of()
    seq = compute(core, list(range(11)))
    before = snapshot(core)
    with pytest.raises(InvalidInput, match="ends of blocks of 4 tokens; truncate to 8"):
        seq.truncate(10)
    assert snapshot(core) == before
    seq.truncate(4)
    plan = core.plan([seq], [[9]])
    assert plan.groups[1].state_reads.tolist() == [seq.tables[1][0]]
    core.rollback(plan)
    core.check_valid()


def test_truncation_behind_an_evicted_state_is_refused():
    core = core_of()
    seq = compute(core, list(range(11)))
    core.clear()
    with pytest.raises(InvalidInput, match="open the sequence anew"):
        seq.truncate(4)


def test_a_match_ends_where_a_state_is():
    core = core_of()
    compute(core, list(range(10))).close()
    assert core.cached_length([*range(9), 99]) == 8
    assert core.cached_length([*range(10), 99]) == 10
    assert core.cached_length([*range(7), 99]) == 4
    assert core.cached_length(range(8)) == 4


def test_a_shorter_unfinished_block_stays_beside_a_longer_one():
    core = core_of()
    compute(core, list(range(7))).close()
    longer = core.open(range(6))
    assert longer.num_cached == 4  # the state of the block that is there is behind token 6
    step(core, longer, [4, 5])
    longer.close()
    assert core.cached_length([*range(6), 50]) == 6
    assert core.cached_length([*range(7), 50]) == 7


def test_a_full_group_of_states_is_cache_full_before_anything_changes():
    core = core_of(2)
    first = compute(core, list(range(5)))
    before = snapshot(core)
    with pytest.raises(CacheFull):
        core.plan([first], [list(range(8))])
    assert snapshot(core) == before


def test_a_sequence_goes_back_to_its_fork_where_truncation_cannot():
    core = core_of()
    seq = compute(core, list(range(6)))
    fork = seq.fork()
    state = fork.tables[1][1]
    step(core, seq, [6, 7, 8])
    seq.rewind(fork)
    assert (seq.tokens, seq.tables[1][1]) == (list(range(6)), state)
    core.check_valid()
    fork.close()
    step(core, seq, [50])
    core.check_valid()
    other = compute(core, [1, 2, 3])
    with pytest.raises(InvalidInput, match="does not begin with"):
        seq.rewind(other)


def test_steps_are_committed_as_planned():
    core = core_of()
    seq = core.open([1])
    plan = core.plan([seq], [[1, 2, 3]])
    with pytest.raises(InvalidInput, match="committed as planned"):
        core.commit(plan, [[1, 2]])
    core.commit(plan)


# ---- frames ------------------------------------------------------------------------------------------------------


def test_frames_that_share_an_id_are_told_apart_by_their_digest():
    core = core_of()
    seq = core.open([5, 5], extra_keys={0: b"a", 1: b"b"})
    core.commit(core.plan([seq], [[5, 5]], extra_keys=[{0: b"a", 1: b"b"}]))
    core.commit(core.plan([seq], [[5, 5, 5]], extra_keys=[{0: b"c", 1: b"d", 2: b"e"}]))
    assert core.cached_length([5] * 6, extra_keys=dict(enumerate([b"a", b"b", b"c", b"d", b"e", b"f"]))) == 5
    assert core.cached_length([5] * 6, extra_keys=dict(enumerate([b"a", b"b", b"c", b"x", b"e", b"f"]))) == 0
    core.check_valid()
    child = seq.fork()
    core.commit(core.plan([child], [[5]], extra_keys=[{0: b"g"}]))
    assert 5 not in seq.extra_keys


def test_frames_are_checked():
    with pytest.raises(InvalidInput, match=r"takes frames \[T, 3\], at least one; got \(0, 3\)"):
        frames_of(np.zeros((0, 3)), 3)
    with pytest.raises(TypeError, match="floating-point"):
        frames_of([[1, 2, 3]], 3)
    rows = [frames_of(np.ones((count, 2)), 2) for count in (3, 1)]
    assert padded(rows).tolist() == [[[1, 1]] * 3, [[1, 1], [0, 0], [0, 0]]]


def test_what_generation_admits_has_room_for_the_new_states_beside_the_old_ones():
    admitted = 0
    for blocks, prompt, new, copies, chunk in product(range(1, 7), (1, 3, 4, 6, 9), (1, 2, 6), (1, 3), (1, 3, 5, 9)):
        core = core_of(blocks)
        try:
            CacheDecoder(SimpleNamespace(core=core)).check_fits(prompt, new, copies)
        except CacheFull:
            continue
        admitted += 1
        seq = core.open(range(prompt), max_new_tokens=new)
        while seq.length < prompt:
            step(core, seq, range(seq.length, min(seq.length + chunk, prompt)))
        seqs = [seq, *(seq.fork() for _ in range(copies - 1))]
        for _ in range(new - 1):
            core.commit(core.plan(seqs, [[100 + row] for row in range(copies)]))
    assert admitted > 100
