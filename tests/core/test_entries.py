"""The bookkeeping of activations, against an ordered dictionary."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache_core import AfterSightings, InvalidInput, InvalidType, Sampled, UsageError
from kvcache_core.admission import AllAdmitted, admission
from kvcache_core.entries import EntryCache


def use(entries, *keys, size=1):
    """Look keys up and keep what is missing; returns the keys that were computed."""
    lookup = entries.look_up([key.encode() for key in keys])
    for sample, found in enumerate(lookup.found):
        assert found is None or found == keys[sample].upper()
    computed = [keys[sample] for sample in lookup.compute]
    entries.keep(lookup, [key.upper() for key in computed], [size] * len(computed))
    entries.check_valid()
    return computed


def test_equal_samples_of_one_call_are_computed_once():
    entries = EntryCache(size=4)
    assert use(entries, "a", "b", "a", "a") == ["a", "b"]
    assert (entries.hit_entries, entries.miss_entries) == (2, 2)
    assert use(entries, "a", "b") == []


def test_least_recently_used_goes_first():
    entries = EntryCache(size=2)
    use(entries, "a")
    use(entries, "b")
    use(entries, "a")
    use(entries, "c")
    assert b"a" in entries and b"b" not in entries
    assert entries.evicted_entries == 1


calls = st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=4), max_size=40)


@given(calls, st.integers(1, 6))
def test_entries_follow_a_naive_lru(history, size):
    entries, naive = EntryCache(size=size), OrderedDict()
    for keys in history:
        computed = use(entries, *keys)
        missing = [key for key in dict.fromkeys(keys) if key not in naive]
        assert computed == missing
        for key in reversed(dict.fromkeys(keys)):  # what is let go together is let go last to first
            if key in naive:
                naive.move_to_end(key)
        for key in missing:
            naive[key] = True
            if len(naive) > size:
                naive.popitem(last=False)
        assert {key for key in "abcdefgh" if key.encode() in entries} == set(naive)


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 9)), max_size=60), st.integers(1, 20))
def test_bytes_stay_below_the_memory(history, memory):
    entries, naive, sizes = EntryCache(memory=memory), OrderedDict(), {}
    for key, size in history:
        sizes.setdefault(key, size)
        use(entries, key, size=sizes[key])
        if key in naive:
            naive.move_to_end(key)
        elif sizes[key] <= memory:
            while sum(naive.values()) + sizes[key] > memory:
                naive.popitem(last=False)
            naive[key] = sizes[key]
        assert {key for key in "abcdefgh" if key.encode() in entries} == set(naive)
        assert entries.bytes == sum(naive.values())


@given(calls, st.integers(1, 9))
def test_a_batch_under_a_byte_limit_follows_a_naive_lru(history, memory):
    entries, naive = EntryCache(memory=memory), OrderedDict()
    for keys in history:
        missing = use(entries, *keys, size=2)
        for key in reversed(dict.fromkeys(keys)):
            if key in naive:
                naive.move_to_end(key)
        for key in missing if memory > 1 else ():
            naive[key] = True
            if 2 * len(naive) > memory:
                naive.popitem(last=False)
        assert {key for key in "abcdefgh" if key.encode() in entries} == set(naive)


def test_a_rule_that_raises_leaves_what_was_kept_before_and_no_live_block():
    class Rule:
        def admit(self, key):
            if key == b"c":
                raise RuntimeError("a rule of the user's own")
            return True

    entries = EntryCache(size=4, admit=Rule())
    with pytest.raises(RuntimeError, match="own"):
        use(entries, "a", "b", "c", "d")
    entries.check_valid()
    assert [key for key in "abcd" if key.encode() in entries] == ["a", "b"]
    assert use(entries, "a", "b") == []


def test_an_entry_larger_than_the_memory_is_refused_and_evicts_nothing():
    entries = EntryCache(memory=10)
    use(entries, "a", size=9)
    use(entries, "b", size=11)
    assert b"a" in entries and b"b" not in entries
    assert (entries.refused_entries, entries.evicted_entries) == (1, 0)


def test_many_small_entries_under_a_byte_limit():
    entries = EntryCache(memory=1000)
    for at in range(1200):
        use(entries, str(at))
    assert len(entries) == entries.bytes == 1000


@pytest.mark.parametrize("size", [1, 3, 8, 50])
def test_resize_keeps_the_most_recent(size):
    entries = EntryCache(size=8)
    for key in "abcdefgh":
        use(entries, key)
    entries.resize(size)
    entries.check_valid()
    kept = "abcdefgh"[-size:]
    assert [key for key in "abcdefgh" if key.encode() in entries] == list(kept)
    assert use(entries, *kept) == []


def test_resize_from_entries_to_bytes_and_back():
    entries = EntryCache(size=8)
    for key in "abcdef":
        use(entries, key, size=4)
    entries.resize(memory=10)
    entries.check_valid()
    assert (len(entries), entries.bytes, entries.size) == (2, 8, None)
    entries.resize(1)
    assert (len(entries), entries.size) == (1, 1)
    with pytest.raises(InvalidInput, match=r"size \(entries\) or memory"):
        entries.resize()
    with pytest.raises(InvalidInput):
        entries.resize(0)


def test_clear_drops_everything_and_counts_no_eviction():
    entries = EntryCache(size=8)
    use(entries, "a", "b")
    entries.clear()
    entries.check_valid()
    assert (len(entries), entries.bytes, entries.evicted_entries) == (0, 0, 0)


# ---- admission ---------------------------------------------------------------------------------------------


def test_sampled_keeps_its_share_and_what_comes_again():
    entries = EntryCache(size=10_000, admit=Sampled(0.2, seed=1))
    for at in range(4000):
        use_one(entries, at)
    assert 0.17 < len(entries) / 4000 < 0.23
    for _ in range(60):
        use_one(entries, "hot")
    assert b"hot" in entries


def use_one(entries, key):
    lookup = entries.look_up([str(key).encode()])
    entries.keep(lookup, [0] * len(lookup.compute), [1] * len(lookup.compute))


def test_after_sightings_keeps_nothing_that_comes_once():
    entries = EntryCache(size=2, admit=AfterSightings(2))
    use(entries, "a")
    use(entries, "a")
    for key in "bcdefg":
        use(entries, key)
    assert b"a" in entries and len(entries) == 1
    assert entries.refused_entries == 7


def test_after_sightings_forgets_the_least_recently_seen():
    rule = AfterSightings(2, remember=2)
    assert [rule.admit(key) for key in (b"a", b"b", b"c", b"a")] == [False] * 4


@pytest.mark.parametrize("share", [0, -0.5, 1.5, "half", True])
def test_a_share_is_a_probability(share):
    with pytest.raises(InvalidInput, match="share"):
        Sampled(share)


@pytest.mark.parametrize("count", [0, 1.5, True])
def test_sightings_are_counted_in_whole_numbers(count):
    with pytest.raises(InvalidInput, match="count"):
        AfterSightings(count)


def test_a_rule_is_all_or_has_admit():
    assert isinstance(admission("all"), AllAdmitted)
    rule = Sampled(0.5)
    assert admission(rule) is rule
    for wrong in ("some", 0.2, None):
        with pytest.raises(InvalidType, match="admit must be"):
            admission(wrong)


def test_advice_from_recorded_accesses():
    entries = EntryCache(size=5)
    with pytest.raises(UsageError, match="record"):
        entries.advice()
    entries.record(1000)
    for _ in range(20):
        for key in "abcdefghij":
            use(entries, key, size=100)
    advice = entries.advice(0.5)
    assert (advice.size, advice.best, advice.bytes, advice.seconds) == (5, 10, 1000, 95.0)
    entries.resize(memory=500)
    assert entries.advice().size == 5
    entries.record(0)
    assert entries.trace is None
