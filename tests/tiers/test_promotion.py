"""Promotion in chunks: what comes up, what is asked for, what fails."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache_core.opentiers import tier_key
from kvcache_core.poolitems import block_codecs
from kvcache_core.tiers import RamTier, open_tier
from tests.tiers.test_tiering import LAYOUT, SIZE, WEIGHTS, Cache, prompt

pytestmark = pytest.mark.filterwarnings("ignore::kvcache_core.KVCacheWarning")

ROW_BYTES = sum(codec.value_bytes for codec in block_codecs(LAYOUT, WEIGHTS, b"", b""))
"""The values of one block of tokens, in both layer groups."""


class Watched(RamTier):
    """Notes what is asked for, batch by batch; fails when asked for one of some keys."""

    def __init__(self) -> None:
        super().__init__(1 << 24)
        self.failing: set[bytes] = set()
        self.asked: list[list[bytes]] = []

    def get_many(self, keys: Any) -> Any:
        self.asked.append(list(keys))
        if self.failing & set(keys):
            raise OSError("gone")
        return super().get_many(keys)


def in_chunks(blocks: int) -> Any:
    return patch("kvcache_core.promotion._CHUNK_BYTES", blocks * ROW_BYTES)


def filled(tier: Any, tokens: list[int]) -> list[list[bytes]]:
    """Let a prompt be evicted into a tier; returns the keys of its full blocks, per layer group."""
    cache = Cache(len(tokens) // SIZE + 1, [tier])
    cache.run(tokens)
    cache.run(prompt(99, len(tokens)))
    assert cache.stack.flush(5)
    seq = cache.core.open(tokens)
    keys = [[tier_key("block", group, key) for group in range(2)] for key in seq.prompt_keys]
    cache.core.close(seq)
    cache.stack.close()
    return keys


places = st.sets(st.tuples(st.integers(0, 7), st.integers(0, 1)), max_size=2)


@given(st.integers(1, 8), st.integers(1, 9), places, places, places)
def test_chunks_bring_up_what_lies_in_the_tiers(blocks, chunk, holes, damaged, failing):
    """The head whose blocks are all there, whatever the chunks; a tier that fails in the middle ends it at a chunk."""
    tokens, tier = prompt(1, blocks * SIZE + 1), Watched()
    keys = filled(tier, tokens)
    holes, damaged, failing = (
        {keys[at][group] for at, group in found if at < blocks} for found in (holes, damaged, failing)
    )
    tier.delete_many(list(holes))
    tier.put_many([(key, b"noise") for key in damaged - holes])
    tier.failing, tier.asked = failing, []

    expected, batches = 0, []
    for start in range(0, blocks, chunk):
        rows = keys[start : start + chunk]
        batches.append([key for row in rows for key in row])
        lost = holes | damaged | (set(batches[-1]) if failing & set(batches[-1]) else set())
        whole = next((at for at, row in enumerate(rows) if lost & set(row)), len(rows))
        expected += whole
        if whole < len(rows):
            break

    cache = Cache(40, [tier])
    with in_chunks(chunk):
        assert cache.run(tokens) == expected * SIZE
    assert tier.asked == batches, "each chunk in one batch, nothing behind a gap, nothing twice"
    assert cache.stack.promoted_tokens == expected * SIZE
    cache.stack.close()


def test_views_into_a_file_are_valid_until_they_are_imported(tmp_path):
    disk = open_tier(f"disk:{tmp_path}?max=8MiB&sync=off")
    tokens = prompt(1, 8 * SIZE + 1)
    filled(disk, tokens)
    cache = Cache(40, [disk])
    with in_chunks(1):
        assert cache.run(tokens) == 8 * SIZE
    cache.stack.close()
    disk.close()


def test_what_an_import_evicts_is_still_found():
    """The pool has the tail of one layer group; the chunks before it need its room."""
    for spare in range(6):
        tokens, tier = prompt(1, 5 * SIZE + 1), RamTier(1 << 20)
        cache = Cache(6 + spare, [tier])
        cache.run(tokens)
        cache.run(prompt(2, (2 + spare) * SIZE + 1))
        assert cache.stack.flush(5)
        with in_chunks(1):
            assert cache.run(tokens) == 5 * SIZE
        cache.stack.close()


def test_an_import_that_fails_leaves_what_came_before():
    tokens, tier = prompt(1, 6 * SIZE + 1), Watched()
    filled(tier, tokens)
    cache = Cache(40, [tier])
    copy = cache.store.import_blocks
    done: list[int] = []

    def fails(group: int, blocks: Any, packed: Any) -> None:
        done.append(group)
        if len(done) == 6:
            raise MemoryError("no room")
        copy(group, blocks, packed)

    cache.store.import_blocks = fails
    seq = cache.core.open(tokens)
    cache.stack.serve(LAYOUT, cache.core.namespace, WEIGHTS, b"")
    with in_chunks(1), pytest.raises(MemoryError, match="no room"):
        cache.stack.promote(seq)
    assert seq.length == seq.num_cached == 2 * SIZE
    cache.check(seq, tokens)
    cache.core.close(seq)
    cache.store.import_blocks = copy
    assert cache.run(tokens) == 6 * SIZE
    cache.stack.close()


def test_a_failure_behind_the_first_chunk_is_a_counted_miss_and_one_warning():
    tokens, tier = prompt(1, 4 * SIZE + 1), Watched()
    tier.failing = set(filled(tier, tokens)[2])
    cache = Cache(40, [tier])
    with in_chunks(1), pytest.warns(UserWarning, match="did not answer") as warned:
        assert cache.run(tokens) == 2 * SIZE
    assert len(warned) == 1
    stats = cache.stack.stats[0]
    assert (stats.hits, stats.misses, stats.errors) == (4, 2, 1)
    cache.stack.close()
