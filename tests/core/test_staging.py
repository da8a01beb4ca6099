"""Memory that is used again: never while somebody holds it, and the checksum that goes with it."""

from __future__ import annotations

import sys
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache_core import crc
from kvcache_core.staging import Staging


def test_memory_is_used_again_when_nobody_holds_a_view_of_it():
    staging = Staging(1 << 20)
    first = staging.take(3, 1000)
    place, row = first.ctypes.data, first[1].data
    del first
    assert staging.nbytes == 0  # a view of one row holds all of it
    assert staging.take(3, 1000).ctypes.data != place
    del row
    again = staging.take(4, 1000)
    assert again.ctypes.data == place
    assert again.shape == (4, 1000)


def test_no_more_is_kept_than_was_said():
    staging = Staging(10_000)
    held = [staging.take(1, 4096) for _ in range(5)]
    held.clear()
    assert staging.nbytes == 8192
    del held
    staging.take(1, 100_000)
    assert staging.nbytes == 8192


@given(steps=st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1, 24, 100]), st.integers(0, 5)), max_size=40))
def test_what_is_held_never_changes(steps):
    """Each array is filled with a number of its own; of some only one row is kept."""
    staging = Staging(4096)
    held: list[tuple[int, np.ndarray]] = []
    for number, (count, nbytes, drop) in enumerate(steps):
        array = staging.take(count, nbytes)
        array[...] = number
        held.append((number, array[-1] if drop % 2 else array))
        if drop < len(held):
            del held[drop]
        assert all((kept == filled).all() for filled, kept in held)
        assert staging.nbytes <= 4096


@given(content=st.binary(max_size=5000), start=st.integers(0, 2**32 - 1))
def test_every_crc_is_that_of_the_standard_library(content, start):
    assert crc.crc32(content, start) == zlib.crc32(content, start)
    assert crc.crc32(memoryview(content)) == zlib.crc32(content)


def test_the_standard_library_is_used_where_the_fast_one_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "isal", None)
    assert crc.fastest() is zlib.crc32


def test_the_fast_one_is_used_where_it_is_there():
    fast = pytest.importorskip("isal.isal_zlib")
    assert crc.fastest() is fast.crc32
