"""The reference itself: numpy attention against loops, and the cached one against it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache_core import BlockCache, BlockLayout, InvalidInput, LayerSpec
from kvcache_core.attention import attend, cached_attention
from kvcache_core.store import NumpyStore


def _by_loops(q, k, v, q_positions, k_positions, window, scale, softcap):
    result = np.zeros((*q.shape[:2], v.shape[2]))
    for head in range(q.shape[0]):
        kv = head // (q.shape[0] // k.shape[0])
        for row, at in enumerate(q_positions):
            seen = [
                column
                for column, other in enumerate(k_positions)
                if other <= at and (window is None or other > at - window)
            ]
            scores = np.array([float(q[head, row] @ k[kv, column]) * scale for column in seen])
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            result[head, row] = (weights / weights.sum()) @ v[kv, seen]
    return result


@given(
    st.integers(0, 2**16),
    st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    st.integers(1, 5),
    st.integers(0, 7),
    st.one_of(st.none(), st.integers(1, 9)),
    st.one_of(st.none(), st.just(0.7)),
    st.one_of(st.none(), st.just(1.5)),
)
def test_attend_equals_loops(seed, heads, new, past, window, scale, softcap):
    rng = np.random.default_rng(seed)
    query_heads, kv_heads = heads
    q = rng.standard_normal((query_heads, new, 6))
    k = rng.standard_normal((kv_heads, past + new, 6))
    v = rng.standard_normal((kv_heads, past + new, 3))
    positions = np.arange(past + new)
    got = attend(q, k, v, positions[past:], positions, window=window, scale=scale, softcap=softcap)
    expected = _by_loops(q, k, v, positions[past:], positions, window, 6**-0.5 if scale is None else scale, softcap)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)


def test_attend_keeps_the_dtype_and_large_scores_do_not_overflow():
    q = np.full((1, 1, 4), 1e4, np.float32)
    result = attend(q, np.repeat(q, 3, 1), np.ones((1, 3, 2), np.float32), np.array([2]), np.arange(3))
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, np.ones((1, 1, 2), np.float32))


def test_query_heads_must_be_a_multiple():
    with pytest.raises(InvalidInput, match="multiple of K/V heads, got 3 and 2"):
        attend(np.ones((3, 1, 2)), np.ones((2, 1, 2)), np.ones((2, 1, 2)), np.arange(1), np.arange(1))


@given(
    st.integers(0, 2**16),
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.sampled_from([None, 1, 3, 7]),
)
def test_cached_attention_over_any_split_equals_one_call(seed, split, window):
    rng = np.random.default_rng(seed)
    total = sum(split)
    q, k = rng.standard_normal((2, 4, total, 6)), rng.standard_normal((2, 2, total, 6))
    v = rng.standard_normal((2, 2, total, 3))
    layout = BlockLayout([LayerSpec.attention(2, 6, 3, window=window)], 3, "float64")
    core, store = BlockCache(40, layout=layout), NumpyStore(layout, 40)
    for array in store.arrays.values():
        array.fill(np.nan)
    rows = [core.open([row]) for row in range(2)]
    parts, at = [], 0
    for count in split:
        plan = core.plan(rows, [[row] * count for row in range(2)])
        new = slice(at, at + count)
        parts.append(cached_attention(q[:, :, new], k[:, :, new], v[:, :, new], 0, store, plan))
        core.commit(plan)
        at += count
    positions = np.arange(total)
    for row in range(2):
        expected = attend(q[row], k[row], v[row], positions, positions, window=window)
        np.testing.assert_allclose(np.concatenate(parts, 2)[row], expected, rtol=1e-12, atol=1e-13)


def test_padding_rows_are_zero_and_leave_the_real_blocks_alone():
    layout = BlockLayout([LayerSpec.attention(1, 2)], 4, "float64")
    core, store = BlockCache(8, layout=layout), NumpyStore(layout, 8)
    rows = [core.open([0]), core.open([1])]
    plan = core.plan(rows, [[0], [1, 1, 1]])
    ones = np.ones((2, 1, 3, 2))
    result = cached_attention(ones, ones, ones, 0, store, plan)
    assert result[0, 0, 1:].tolist() == [[0, 0], [0, 0]]
    blocks = store.arrays[0, "k"].reshape(9, 4, 2)
    assert blocks[rows[0].tables[0][0], 1:].sum() == 0


def test_a_store_refuses_other_shapes():
    store = NumpyStore(BlockLayout([LayerSpec.attention(2, 4)], 4), 2)
    with pytest.raises(InvalidInput, match=r"stores \[N, H, D\] = \(1, 2, 4\), got \(1, 2, 5\)"):
        store.write(0, "k", np.array([4]), np.zeros((1, 2, 5), np.float32))
