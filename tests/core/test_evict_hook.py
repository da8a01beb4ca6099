"""Who is told what when blocks lose their content: the place where tiers attach."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcache_core import BlockCache, BlockLayout, LayerSpec
from kvcache_core.keys import root_key
from kvcache_core.types import Evicted


def fill(core: BlockCache, tokens: list[int]) -> list[bytes]:
    seq = core.open(tokens)
    core.commit(core.plan([seq], [tokens[seq.num_cached :]]))
    keys = list(seq.prompt_keys)
    core.close(seq)
    return keys


def listening(core: BlockCache) -> list[Evicted]:
    heard: list[Evicted] = []
    core.on_evict = heard.extend
    return heard


def test_full_blocks_are_announced_with_their_keys_tail_first():
    core = BlockCache(num_blocks=3, block_size=2)
    heard = listening(core)
    keys = fill(core, [1, 2, 3, 4, 5, 6])
    assert heard == []
    fill(core, [7, 8, 9, 10])
    assert [one.key for one in heard] == [keys[2], keys[1]]
    assert all(one.group == 0 and one.fill == 2 for one in heard)
    core.check_valid()


def test_a_tail_is_announced_without_a_key():
    core = BlockCache(num_blocks=1, block_size=4)
    heard = listening(core)
    fill(core, [1, 2, 3])
    fill(core, [7])
    assert [(one.key, one.fill) for one in heard] == [(None, 3)]


def test_a_tail_written_in_place_is_announced():
    core = BlockCache(num_blocks=1, block_size=4)
    heard = listening(core)
    fill(core, [1, 2, 3])
    seq = core.open([1, 2, 3, 4])
    core.commit(core.plan([seq], [[4]]))
    assert [(one.key, one.fill) for one in heard] == [(None, 3)]


def test_a_step_of_many_rows_is_announced_once():
    core = BlockCache(num_blocks=4, block_size=2)
    fill(core, [1, 2, 3, 4, 5, 6, 7, 8])
    calls: list[int] = []
    core.on_evict = lambda evicted: calls.append(len(evicted))
    seqs = [core.open([11, 12]), core.open([21, 22, 23, 24])]
    core.plan(seqs, [[11, 12], [21, 22, 23, 24]])
    assert calls == [3]


def test_shrinking_is_announced_and_clearing_is_not():
    core = BlockCache(num_blocks=4, block_size=2)
    heard = listening(core)
    keys = fill(core, [1, 2, 3, 4, 5, 6, 7, 8])
    core.resize(3)
    assert [one.key for one in heard] == [keys[3]]
    core.clear()
    assert len(heard) == 1


def test_every_group_is_announced():
    layout = BlockLayout([LayerSpec.attention(1, 2), LayerSpec.attention(1, 2, window=4)], block_size=2)
    core = BlockCache(num_blocks=4, layout=layout)
    heard = listening(core)
    keys = fill(core, [1, 2, 3, 4, 5, 6, 7, 8])
    fill(core, [11, 12, 13, 14, 15, 16, 17, 18])
    for group in range(2):
        assert {one.key for one in heard if one.group == group} == set(keys)


def test_the_root_tells_namespaces_and_salts_apart():
    core = BlockCache(num_blocks=8, block_size=2, namespace=b"one")
    roots = []
    for namespace, salt in ((b"one", b""), (b"one", b"salt"), (b"two", b"")):
        core.namespace = namespace
        seq = core.open([1, 2, 3, 4], salt)
        core.commit(core.plan([seq], [[1, 2, 3, 4]]))
        roots.append(root_key(2, namespace, salt))
        core.close(seq)
    found = core.findable_blocks()
    assert len(found) == 6
    assert [one.root for one in found] == [root for root in roots for _ in range(2)]


def test_what_is_found_elsewhere_counts_as_cached():
    core = BlockCache(num_blocks=8, block_size=2)
    seq = core.open([1, 2, 3, 4, 5])
    core.commit(core.plan([seq], [[1, 2, 3, 4]]))
    core.count_as_cached(seq)
    assert seq.num_cached == 4
    assert (core.stats().hit_tokens, core.stats().miss_tokens) == (4, 1)


@given(prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=30))
def test_a_key_is_findable_or_was_announced_after_it_was_last_published(prompts):
    """Against a dictionary: nothing leaves unannounced, nothing is announced that did not leave."""
    core = BlockCache(num_blocks=6, block_size=2)
    known: set[bytes] = set()

    def forget(evicted: list[Evicted]) -> None:
        for one in evicted:
            if one.key is not None:
                assert one.key in known
                known.discard(one.key)

    core.on_evict = forget
    for prompt in prompts:
        keys = fill(core, prompt)
        known.update(keys)
        assert {one.key for one in core.findable_blocks()} == known
        core.check_valid()
