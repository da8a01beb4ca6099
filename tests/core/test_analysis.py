"""Miss-ratio curves against caches of every size, and the closed form against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache_core import InvalidInput
from kvcache_core.analysis import advise, miss_ratio_curve, reuse_distances, uniform_hit_ratio
from kvcache_core.entries import EntryCache

traces = st.lists(st.integers(0, 12), max_size=80)


def simulate(trace, size):
    entries = EntryCache(size=size)
    for key in trace:
        lookup = entries.look_up([str(key).encode()])
        entries.keep(lookup, [0] * len(lookup.compute), [1] * len(lookup.compute))
    return entries.hit_entries


@given(traces)
def test_distances_against_their_definition(trace):
    found = reuse_distances(trace)
    for place, key in enumerate(trace):
        earlier = [at for at in range(place) if trace[at] == key]
        expected = len(set(trace[earlier[-1] + 1 : place])) if earlier else np.inf
        assert found[place] == expected


@given(traces, st.integers(1, 15))
def test_the_curve_is_what_a_cache_of_that_size_does(trace, size):
    curve = miss_ratio_curve(trace)
    assert round(curve.hit_ratio(size) * len(trace)) == simulate(trace, size)
    assert curve.miss_ratio(size) == pytest.approx(1 - curve.hit_ratio(size)) or not trace
    assert (np.diff(curve.hits) >= 0).all()
    assert curve.keys == len(set(trace))


def test_a_long_trace_is_fast_enough_to_be_n_log_n():
    trace = np.random.default_rng(0).zipf(1.2, 50_000).tolist()
    curve = miss_ratio_curve(trace)
    assert curve.hit_ratio(curve.keys) == pytest.approx(1 - curve.keys / len(trace))


@pytest.mark.parametrize(
    ("size", "items", "accesses"), [(100, 1000, 1000), (100, 1000, 5000), (900, 1000, 3000), (7, 5, 40), (1, 1, 9)]
)
def test_the_uniform_closed_form_against_simulation(size, items, accesses):
    rng = np.random.default_rng(0)
    runs = [simulate(rng.integers(0, items, accesses).tolist(), size) / accesses for _ in range(5)]
    assert uniform_hit_ratio(size, items, accesses) == pytest.approx(np.mean(runs), abs=0.015)


def test_the_closed_form_needs_its_assumptions():
    """One popular item is enough: the formula says 0.1, the cache does far better."""
    rng = np.random.default_rng(0)
    trace = np.where(rng.random(4000) < 0.5, 0, rng.integers(0, 1000, 4000)).tolist()
    assert simulate(trace, 100) / 4000 > 0.5 > 5 * 0.099 > uniform_hit_ratio(100, 1000, 4000)


def test_the_long_run():
    assert uniform_hit_ratio(100, 1000) == 0.1 == pytest.approx(uniform_hit_ratio(100, 1000, 10**6), abs=1e-3)
    assert uniform_hit_ratio(2000, 1000) == 1.0
    with pytest.raises(InvalidInput, match="items"):
        uniform_hit_ratio(1, 0)


def test_advice():
    loop = list(range(10)) * 20
    advice = advise(loop, 5, seconds_per_miss=0.5, bytes_per_entry=100)
    assert (advice.hit_ratio, advice.best, advice.bytes) == (0.0, 10, 1000)
    assert advice.best_hit_ratio == 0.95 and advice.seconds == 95.0
    assert "10 entries" in str(advice) and "+95.00 s" in str(advice)
    assert "is the size that pays" in str(advise(loop, 10))
    assert "no size" in str(advise(range(5), 3))
    assert "no accesses" in str(advise([], 3))
    assert miss_ratio_curve(loop).smallest(0.99) is None
