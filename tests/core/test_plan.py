"""A plan's arrays: positions, slots, block tables, copies, extents, and FlashInfer's three."""

from __future__ import annotations

import numpy as np
from hypothesis import event, given
from hypothesis import strategies as st

from kvcache_core import BlockCache, BlockLayout, LayerSpec
from kvcache_core.plan import PAD_SLOT
from tests.strategies import compute, layouts, prompts, step


def test_a_ragged_step_by_hand():
    core = BlockCache(16, 4)
    first, second = compute(core, [1, 2, 3, 4, 5]), core.open([9, 8])
    plan = core.plan([first, second], [[6], [9, 8]])
    assert plan.seqs == (first, second)
    assert plan.tokens.tolist() == [[6, 0], [9, 8]]
    assert plan.positions.tolist() == [[5, 5], [0, 1]]
    assert plan.starts.tolist() == [5, 0] and plan.counts.tolist() == [1, 2]
    assert plan.kv_lengths.tolist() == [6, 2]
    one, two = first.tables[0], second.tables[0]
    assert plan.block_tables.tolist() == [one, [*two, 0]]
    assert plan.slots.tolist() == [[one[1] * 4 + 1, PAD_SLOT], [two[0] * 4, two[0] * 4 + 1]]
    assert plan.copies.shape == (0, 2)
    assert plan.kv_indptr.tolist() == [0, 2, 3]
    assert plan.kv_indices.tolist() == [*one, *two]
    assert plan.kv_last_page_len.tolist() == [2, 2]
    assert plan.groups[0].extents == [[(4, 6, 0)], [(two[0] * 4, 2, 0)]]
    for name in ("slots", "block_tables", "copies", "kv_indptr", "kv_indices", "kv_last_page_len"):
        assert getattr(plan, name) is getattr(plan.groups[0], name)


def test_dtypes_are_those_kernels_expect():
    core = BlockCache(16, 4)
    seq = core.open([1])
    plan = core.plan([seq], [[1]])
    for name in ("tokens", "positions", "starts", "counts", "slots", "kv_lengths"):
        assert getattr(plan, name).dtype == np.int64, name
    for name in ("block_tables", "copies", "kv_indptr", "kv_indices", "kv_last_page_len"):
        assert getattr(plan, name).dtype == np.int32, name


def test_a_full_last_page_has_all_its_tokens():
    core = BlockCache(16, 4)
    seq = core.open([1])
    assert core.plan([seq], [[1, 2, 3, 4]]).kv_last_page_len.tolist() == [4]


def test_padding_writes_only_into_the_null_block():
    core = BlockCache(16, 4)
    rows = [core.open([row]) for row in range(3)]
    plan = core.plan(rows, [[1], [1, 2, 3, 4, 5], [1, 2]])
    padding = np.arange(5) >= plan.counts[:, None]
    assert np.all(plan.slots[padding] < 4)
    assert np.all(plan.slots[~padding] >= 4)


def test_blocks_reserved_ahead_do_not_show():
    core = BlockCache(16, 4)
    seq = core.open([1], max_new_tokens=20)
    plan = core.plan([seq], [[1]])
    assert len(seq.tables[0]) == 6
    assert plan.block_tables.shape == (1, 1)
    core.commit(plan)
    other = core.open([2, 2, 2, 2, 2])
    plan = core.plan([seq, other], [[1], [2] * 9])
    assert plan.block_tables[0].tolist() == [seq.tables[0][0], 0, 0]


@st.composite
def histories(draw):
    """A cache after some requests, forks and truncations, and a ragged batch on it."""
    core = BlockCache(300, layout=draw(layouts(outputs=False)))
    rows = []
    for prompt in draw(st.lists(prompts(), min_size=1, max_size=4)):
        rows.append(compute(core, prompt))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            rows.append(rows[-1].fork())
        elif kind == 1:
            step(core, rows[-1], draw(prompts(max_size=20)))
        elif kind == 2:
            rows[-1].truncate(rows[-1].length // 2)
    return core, rows, draw(st.lists(prompts(max_size=9), min_size=len(rows), max_size=len(rows)))


@given(histories())
def test_arrays_agree_with_the_sequences(made):
    core, rows, lists = made
    size = core.block_size
    plan = core.plan(rows, lists)
    for group, core_group in zip(plan.groups, core.groups, strict=True):
        window = core_group.window
        assert group.window == window
        for row, (seq, tokens) in enumerate(zip(rows, lists, strict=True)):
            start, end = seq.length, seq.length + len(tokens)
            assert plan.tokens[row, : len(tokens)].tolist() == tokens
            assert plan.positions[row, : len(tokens)].tolist() == list(range(start, end))
            table = group.block_tables[row]
            # Extents cover exactly the visible tokens, in order, and are as long as they can be.
            first = 0 if window is None else max(0, start - window + 1)
            covered = [
                (position, slot)
                for slot0, count, position0 in group.extents[row]
                for position, slot in zip(range(position0, position0 + count), range(slot0, slot0 + count), strict=True)
            ]
            expected = [(at, int(table[at // size]) * size + at % size) for at in range(first, end)]
            assert covered == expected
            assert all(slot >= size for _, slot in covered), "the null block is never read"
            ends = [slot0 + count for slot0, count, _ in group.extents[row]]
            begins = [slot0 for slot0, _, _ in group.extents[row]]
            assert all(left != right for left, right in zip(ends, begins[1:], strict=False))
            # New tokens are written where they will be read.
            assert group.slots[row, : len(tokens)].tolist() == [slot for at, slot in covered if at >= start]
            assert np.all(group.slots[row, len(tokens) :] == PAD_SLOT)
            pages = group.kv_indices[group.kv_indptr[row] : group.kv_indptr[row + 1]]
            assert pages.tolist() == table[: -(-end // size)].tolist()
            assert (len(pages) - 1) * size + group.kv_last_page_len[row] == end
            assert not np.any(table[-(-end // size) :])
        event("several extents" if any(len(extents) > 1 for extents in group.extents) else "one extent")
    core.commit(plan)
    core.check_valid()


@given(histories())
def test_no_two_rows_write_into_one_slot_and_no_slot_is_shared_or_published(made):
    core, rows, lists = made
    held = {number: [list(seq.tables[number]) for seq in rows] for number in range(len(core.groups))}
    plan = core.plan(rows, lists)
    for number, (group, core_group) in enumerate(zip(plan.groups, core.groups, strict=True)):
        real = group.slots[np.arange(group.slots.shape[1]) < plan.counts[:, None]]
        assert len(set(real.tolist())) == len(real)
        for block in set((real // core.block_size).tolist()):
            assert core_group.pool.refs(block) == 1
            assert not core_group.pool.is_findable(block)
        targets = group.copies[:, 1].tolist()
        assert len(set(targets)) == len(targets)
        sources = {block for table in held[number] for block in table}
        assert set(group.copies[:, 0].tolist()) <= sources
        assert not set(targets) & sources
    event("copies" if len(plan.copies) else "no copies")
    core.rollback(plan)
    core.check_valid()


def test_each_group_has_its_own_blocks():
    layout = BlockLayout([LayerSpec.attention(1, 1), LayerSpec.attention(1, 1, window=2)], 2)
    core = BlockCache(8, layout=layout)
    seq = compute(core, list(range(6)))
    plan = core.plan([seq], [[6]])
    assert plan.groups[0].block_tables[0].tolist() == [1, 2, 3, 4]
    assert plan.groups[1].block_tables[0].tolist() == [0, 0, 3, 4]
