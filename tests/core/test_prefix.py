"""The prefix index: nodes, sorted children, duplicates, and no node left over."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache_core import siblings
from kvcache_core.keys import block_extras, chain_keys, root_key
from kvcache_core.prefix import PrefixIndex
from tests.strategies import common_head


def _index(size=3, blocks=200):
    return PrefixIndex(size, [blocks])


def _data(tokens):
    return np.array(tokens, np.int32).tobytes()


def _tail(index, parent, tokens, block, extras=None):
    node = index.open_tail(parent, extras or {})
    index.append(node, tokens)
    index.attach(node, 0, block)
    return node


def test_a_full_tail_is_found_by_its_key_and_a_second_one_is_handed_the_first():
    index = _index()
    root = index.open_root(b"", b"")
    first = _tail(index, root, [1, 2, 3], 1)
    assert index.is_open(first) and index.key(first) is None
    assert index.complete(first) == first
    assert index.child(root, _data([1, 2, 3])) == first and not index.is_open(first)
    second = _tail(index, root, [1, 2, 3], 2)
    assert index.complete(second) == first
    assert index.key(second) is None
    index.detach(0, 2)
    assert index.block(0, first) == 1
    index.check_valid({root: 1})


def test_the_keys_of_a_prompt_are_the_keys_its_blocks_get():
    index = _index()
    root = index.open_root(b"n", b"s")
    extras = {1: b"x", 4: b"y"}
    keys = chain_keys(root_key(3, b"n", b"s"), _data(range(8)), 3, extras)
    assert len(keys) == 2
    node = root
    for at, tokens in enumerate(([0, 1, 2], [3, 4, 5])):
        node = _tail(index, node, tokens, at + 1, block_extras(extras, at, 3))
        index.complete(node)
        assert index.key(node) == keys[at]
    index.check_valid({root: 1})


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=25),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.booleans(),
    st.data(),
)
def test_heads_come_longest_first_and_none_is_missed(runs, probe, with_extras, data):
    index = _index()
    root = index.open_root(b"", b"")
    shared = {}
    for number, run in enumerate(runs, 1):
        extras = {0: b"x"} if with_extras and data.draw(st.booleans()) else {}
        node = _tail(index, root, run, number, extras)
        if len(run) == 3:
            if index.complete(node) != node:
                index.detach(0, number)
                continue
        elif data.draw(st.booleans()):
            index.close_tail(node)
        shared[node] = 0 if extras else common_head(run, probe)
    found = list(index.heads(root, np.array(probe, np.int32)))
    counts = [count for count, _ in found]
    assert counts == sorted(counts, reverse=True)
    assert sorted((node, count) for count, node in found) == sorted((n, c) for n, c in shared.items() if c)
    index.check_valid({root: 1})


@given(
    st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(0, 1), min_size=3, max_size=3)), max_size=30),
    st.randoms(),
)
def test_nothing_is_left_when_every_block_went(grown, rng):
    """Blocks go in any order: a node stays while it has a block or a child, and not longer."""
    index = _index()
    root = index.open_root(b"", b"")
    nodes, blocks = [root], []
    for number, (parent, tokens) in enumerate(grown, 1):
        above = nodes[parent % len(nodes)]
        node = _tail(index, above, tokens, number)
        known = index.complete(node)
        if known != node:
            index.detach(0, number)
            continue
        nodes.append(known)
        blocks.append(number)
    index.check_valid({root: 1})
    rng.shuffle(blocks)
    for block in blocks:
        index.detach(0, block)
        index.check_valid({root: 1})
    assert len(index) == 1
    index.unpin(root)
    assert len(index) == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=60), st.integers(0, 40))
def test_siblings_are_a_sorted_list(changes, probe):
    """In parts of two, against `sorted`; several nodes have the same tokens, or the same first one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(siblings, "_PART", 2)

        def key(node):
            return np.array([7 * (node // 9) % 300, 300 - node // 3], "<i4").tobytes()

        def order(tokens):
            return int.from_bytes(tokens[:4], "little"), tokens

        kept, expected = siblings.Siblings(key, 1), {1}
        for add, node in changes:
            if add and node not in expected:
                kept.add(node)
                expected.add(node)
            elif not add and node in expected and len(expected) > 1:
                kept.remove(node)
                expected.remove(node)
            kept.check_valid()
        assert sorted(kept) == sorted(expected)
        assert kept.only() == (next(iter(expected)) if len(expected) == 1 else 0)
        wanted = key(probe)
        before, behind = kept.around(wanted)
        assert [*kept.from_(wanted)] == [*behind] == [node for node in kept if order(key(node)) >= order(wanted)]
        assert [*before][::-1] == [node for node in kept if order(key(node)) < order(wanted)]


def test_nodes_are_used_again():
    index = _index()
    for salt in range(100):
        root = index.open_root(b"", bytes([salt]))
        node = _tail(index, root, [1], 1)
        index.detach(0, 1)
        assert node
        index.unpin(root)
    assert index._top <= 4


def test_renamed_blocks_keep_their_nodes():
    index = _index(blocks=8)
    root = index.open_root(b"", b"")
    nodes = [_tail(index, root, [token], block) for token, block in ((1, 2), (2, 7), (3, 8))]
    index.move_block(0, {7: 1, 8: 3}, 4)
    assert [index.block(0, node) for node in nodes] == [2, 1, 3]
    assert [index.node(0, block) for block in (2, 1, 3, 4)] == [*nodes, 0]
    index.check_valid({root: 1})


def test_a_tail_in_a_step_is_not_offered():
    index = _index()
    root = index.open_root(b"", b"")
    node = _tail(index, root, [1, 2], 1)
    index.begin_step(node)
    assert list(index.heads(root, np.array([1, 2], np.int32))) == []
    index.end_step(node)
    assert list(index.heads(root, np.array([1, 2], np.int32))) == [(2, node)]
