"""The shared extents of a step against a listing of every slot of every row."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kvcache_core import BlockCache, BlockLayout, LayerSpec
from kvcache_core.extents import past_extents, shared_extents


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
