"""The shared extents of a step against a listing of every slot of every row."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kvcache_core import BlockCache, BlockLayout, LayerSpec
from kvcache_core.extents import past_extents, shared_extents
from kvcache_core.placement import count_extents


@st.composite
def forests(draw):
    """Rows as lists of extents whose blocks come from a few shared chains and from blocks of their own."""
    block = draw(st.integers(1, 4))
    chains = draw(st.lists(st.lists(st.integers(0, 12), unique=True, max_size=6), min_size=1, max_size=3))
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        chain = draw(st.sampled_from(chains))
        blocks = chain[: draw(st.integers(0, len(chain)))]
        blocks += draw(st.lists(st.integers(13, 40), unique=True, max_size=4))
        first = draw(st.integers(0, block - 1))
        extents, position = [], 0
        for at, number in enumerate(blocks):
            skipped = first if at == 0 else 0
            extents.append((number * block + skipped, block - skipped, position))
            position += block - skipped
        rows.append(extents)
    return rows


@given(forests())
def test_every_slot_is_listed_once_with_exactly_its_readers(rows):
    naive = {}
    for row, extents in enumerate(rows):
        for slot, size, _ in extents:
            for one in range(slot, slot + size):
                naive.setdefault(one, []).append(row)
    found = {}
    for piece in shared_extents(rows):
        assert piece.size >= 1
        for one in range(piece.slot, piece.slot + piece.size):
            assert one not in found
            found[one] = list(piece.rows)
    assert found == naive


@given(forests())
def test_pieces_are_as_long_as_they_can_be(rows):
    pieces = shared_extents(rows)
    for left, right in pairwise(pieces):
        assert left.slot + left.size <= right.slot
        assert left.slot + left.size < right.slot or left.rows != right.rows


@given(
    window=st.none() | st.integers(1, 20),
    head=st.integers(1, 20),
    tails=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 7)), min_size=1, max_size=5),
    block_size=st.integers(1, 4),
)
def test_past_and_new_tokens_are_what_each_row_sees(window, head, tails, block_size):
    layout = BlockLayout([LayerSpec.attention(1, 1, window=window)], block_size)
    core = BlockCache(400, block_size=block_size, layout=layout)
    parent = core.open(list(range(head)))
    core.commit(core.plan([parent], [list(range(head))]))
    rows = [parent.fork() for _ in tails]
    for at, (own, _) in enumerate(tails):
        if own:
            core.commit(core.plan([rows[at]], [[100 + at] * own]))
    plan = core.plan(rows, [[200 + at] * new for at, (_, new) in enumerate(tails)])
    group = plan.groups[0]
    for row, (past, extents) in enumerate(zip(past_extents(group), group.extents, strict=True)):
        seen = [slot + step for slot, size, _ in past for step in range(size)]
        seen += group.slots[row, : plan.counts[row]].tolist()
        assert seen == [slot + step for slot, size, _ in extents for step in range(size)]
    core.rollback(plan)
    core.check_valid()


@given(
    rows=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=6),
    order=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), max_size=40),
    together=st.booleans(),
    block_size=st.integers(1, 4),
)
def test_rows_that_said_how_far_they_grow_stay_one_extent_each(rows, order, together, block_size):
    """However their steps interleave."""
    core = BlockCache(400, block_size=block_size)
    seqs = [core.open([row] * prompt, max_new_tokens=new) for row, (prompt, new) in enumerate(rows)]
    for chosen in [seqs] if together else [[seq] for seq in seqs]:
        core.commit(core.plan(chosen))
    for pick, count in order:
        seq = seqs[pick % len(seqs)]
        room = sum(rows[pick % len(seqs)]) - seq.length
        if room:
            core.commit(core.plan([seq], [[99] * min(count, room)]))
    assert [count_extents(seq.tables[0]) for seq in seqs] == [1] * len(seqs)
    core.check_valid()


@given(
    shared=st.integers(0, 20),
    rows=st.integers(2, 6),
    own=st.integers(1, 12),
    new=st.integers(1, 12),
    forked=st.booleans(),
    block_size=st.integers(1, 4),
)
def test_equal_tails_behind_a_shared_prefix_lie_equally_spaced(shared, rows, own, new, forked, block_size):
    """So that they are one strided view: the prefix is one piece for all rows, the tails are of one size."""
    core = BlockCache(400, block_size=block_size)
    head, tails = list(range(shared)), [[50 + row] * own for row in range(rows)]
    seqs = [core.open([*head, *tails[0]], max_new_tokens=new)]
    if shared:
        core.commit(core.plan(seqs, [head]))
    if forked:
        seqs += [seqs[0].fork() for _ in range(rows - 1)]
    else:
        seqs += [core.open([*head, *tail], max_new_tokens=new) for tail in tails[1:]]
    core.commit(core.plan(seqs, [[*head, *tail][seq.length :] for seq, tail in zip(seqs, tails, strict=True)]))
    for at in range(new):
        plan = core.plan(seqs, [[70 + at]] * rows)
        alone = [piece for piece in shared_extents(plan.groups[0].extents) if len(piece.rows) == 1]
        assert [piece.rows for piece in alone] == [(row,) for row in range(rows)]
        assert len({piece.size for piece in alone}) == 1
        assert len({right.slot - left.slot for left, right in pairwise(alone)}) == 1
        core.commit(plan)
