"""Which weights are in memory: the same as a dictionary in order of use would have, and never more than the limit."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache_core.errors import CacheFull
from kvcache_core.residence import Residence

NAMES = "abcdef"


class Naive:
    """Tensors in order of use."""

    def __init__(self, memory: int, sizes: dict[str, int]) -> None:
        self.memory, self.sizes = memory, sizes
        self.here: OrderedDict[str, None] = OrderedDict()
        self.read = 0

    def run(self, tensors: list[str]) -> bool:
        """Whether there was room."""
        needed = sum(self.sizes[name] for name in tensors)
        if needed > self.memory:
            return False
        missing = [name for name in tensors if name not in self.here]
        while sum(self.sizes[name] for name in [*self.here, *missing]) > self.memory:
            self.here.pop(next(name for name in self.here if name not in tensors))
        self.read += sum(self.sizes[name] for name in missing)
        for name in reversed(tensors):  # a chain is let go from its end
            self.here.pop(name, None)
            self.here[name] = None
        return True


units = st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True), min_size=1, max_size=5)


@given(st.lists(st.integers(1, 9), min_size=6, max_size=6), st.integers(5, 40), units, st.data())
def test_the_same_as_a_naive_lru(sizes, memory, parts, data):
    by_name = dict(zip(NAMES, sizes, strict=True))
    here: set[str] = set()
    residence = Residence(memory, by_name, {str(at): part for at, part in enumerate(parts)}, here.add, here.remove)
    naive = Naive(memory, by_name)
    for at in data.draw(st.lists(st.integers(0, len(parts) - 1), max_size=30)):
        if naive.run(parts[at]):
            residence.hold(str(at))
            residence.check_valid()
            residence.let_go(str(at))
        else:
            with pytest.raises(CacheFull):
                residence.hold(str(at))
            naive.here.clear()  # what nobody holds was dropped in the attempt
            residence.clear()
        residence.check_valid()
        assert here == set(naive.here) == {name for name in NAMES if residence.is_here(name)}
        assert residence.stats().bytes_read == naive.read
    assert residence.stats().peak_bytes <= memory


def test_what_runs_is_never_dropped():
    residence = Residence(10, {"a": 6, "b": 6}, {"outer": ["a"], "inner": ["b"]}, lambda _: None, lambda _: None)
    residence.hold("outer")
    with pytest.raises(CacheFull, match="12 bytes of weights at a time, the limit is 10"):
        residence.hold("inner")
    assert residence.is_here("a") and not residence.is_here("b")
    residence.let_go("outer")
    residence.hold("inner")
    assert not residence.is_here("a")
    with pytest.raises(CacheFull, match="what is running"):
        residence.resize(5)
    residence.let_go("inner")
    residence.resize(5)
    assert residence.stats().bytes == 0
    residence.check_valid()


def test_a_failing_read_leaves_all_as_it_was():
    def load(name: str) -> None:
        if name == "b":
            raise OSError("the disk is gone")

    residence = Residence(10, {"a": 2, "b": 2}, {"both": ["a", "b"]}, load, lambda _: None)
    with pytest.raises(OSError, match="gone"):
        residence.hold("both")
    residence.check_valid()
    assert residence.is_here("a") and not residence.is_here("b")
    residence.clear()
    assert residence.stats().bytes == 0


def test_counters_add_up_by_module():
    residence = Residence(
        8,
        {"a": 4, "b": 4, "c": 4},
        {"experts.1": ["a"], "experts.10": ["b"], "experts.1.inner": ["c"]},
        lambda _: None,
        lambda _: None,
    )
    for unit in ("experts.1", "experts.10", "experts.1", "experts.1.inner"):
        residence.hold(unit)
        residence.let_go(unit)
    stats = residence.stats()
    assert (stats.of("experts.1").hits, stats.of("experts.1").misses) == (1, 2)
    assert stats.of("experts.10").misses == 1
    assert (stats.hits, stats.misses, stats.bytes_read, stats.total_bytes, stats.evicted) == (1, 3, 12, 12, 1)
    assert stats.hit_ratio == 0.25
