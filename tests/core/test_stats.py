"""Counters."""

from __future__ import annotations

import pytest

from kvcache_core import BlockCache, BlockLayout, CacheStats, LayerSpec
from tests.strategies import compute


def test_counters_of_a_small_history():
    layout = BlockLayout([LayerSpec.attention(2, 8)], 4)
    core = BlockCache(6, layout=layout)
    assert core.stats() == CacheStats(num_blocks=6, free_blocks=6, block_size=4, bytes_per_block=layout.bytes_per_block)
    compute(core, [1, 2, 3, 4, 5]).close()
    seq = compute(core, [1, 2, 3, 4, 6])
    stats = core.stats()
    assert (stats.hit_tokens, stats.miss_tokens) == (4, 6)
    assert (stats.live_blocks, stats.cached_blocks, stats.free_blocks) == (2, 1, 3)
    assert stats.open_sequences == 1
    compute(core, list(range(50, 66)))
    assert core.stats().evicted_blocks == 1
    seq.close()
    assert core.stats().live_blocks == 4


def test_groups_are_counted_together():
    layout = BlockLayout([LayerSpec.attention(1, 1), LayerSpec.attention(1, 1, window=4)], 4)
    core = BlockCache(10, layout=layout)
    compute(core, list(range(12)))
    stats = core.stats()
    assert stats.num_blocks == 20
    assert stats.live_blocks + stats.cached_blocks + stats.free_blocks == 20
    assert (stats.live_blocks, stats.cached_blocks) == (4, 2)


def test_stats_are_read_by_name_and_as_a_mapping():
    stats = CacheStats(hit_tokens=3, miss_tokens=1)
    assert stats["hit_tokens"] == 3
    assert dict(stats)["miss_tokens"] == 1
    assert stats.hit_ratio == 0.75
    assert CacheStats().hit_ratio == 0.0
    with pytest.raises(KeyError, match="no counter 'hits'; there are hit_tokens"):
        stats["hits"]
    with pytest.raises(AttributeError):
        stats.hit_tokens = 4
