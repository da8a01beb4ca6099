"""Blocks copied in the host's memory, by one thread and by two."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from kvcache_torch import hostcopy

BLOCKS = [4, 5, 6, 1, 9, 8]
SHAPES = ((2, 3, 4), (1, 1, 1), (5, 2, 7))


@pytest.fixture
def threads(monkeypatch):
    """The threads that write into pools."""
    seen = set()

    class Watched(np.ndarray):
        def __setitem__(self, at, value):
            seen.add(threading.get_ident())
            super().__setitem__(at, value)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return seen, Watched


@pytest.mark.parametrize(("least", "count"), [(0, 2), (1 << 30, 1)])
def test_copied_in_and_out_again(monkeypatch, threads, least, count):
    seen, watched = threads
    monkeypatch.setattr(hostcopy, "_WORTH_A_THREAD", least)
    draw = np.random.default_rng(0)
    pools = [draw.normal(size=(10, *shape)) for shape in SHAPES]
    packed = [draw.normal(size=(len(BLOCKS), *shape)) for shape in SHAPES]
    before = [pool.copy() for pool in pools]
    hostcopy.copy_in([(pool.view(watched), part) for pool, part in zip(pools, packed, strict=True)], BLOCKS)
    others = np.setdiff1d(range(10), BLOCKS)
    for pool, part, old in zip(pools, packed, before, strict=True):
        assert np.array_equal(pool[BLOCKS], part) and np.array_equal(pool[others], old[others])
    assert len(seen) == count
    found = [np.empty_like(part) for part in packed]
    hostcopy.copy_out(list(zip(pools, found, strict=True)), BLOCKS)
    assert all(map(np.array_equal, found, packed))


@pytest.mark.parametrize("bad", range(3))
def test_what_fails_in_either_thread_is_raised(monkeypatch, threads, bad):
    monkeypatch.setattr(hostcopy, "_WORTH_A_THREAD", 0)
    pairs = [(np.zeros((10, *shape)), np.ones((6, *shape))) for shape in SHAPES]
    pairs[bad] = (pairs[bad][0], np.ones((6, 11)))
    with pytest.raises(ValueError, match="broadcast"):
        hostcopy.copy_in(pairs, BLOCKS)
