"""Many threads over three tiers: nothing wrong, nothing lost that was acknowledged, nothing left behind."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import pytest

from kvcache_core import CacheFull
from kvcache_core.opentiers import tier_key
from tests.tiers.test_tiering import SIZE, Cache, prompt


def load(tmp_path: Any, url: str, threads: int, requests: int) -> None:
    running, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    cache = Cache(64, ["ram:64kB", f"disk:{tmp_path}?max=2MiB&sync=off", url])
    wrong: list[str] = []

    def work(number: int) -> None:
        draw = np.random.default_rng(number)
        for _ in range(requests // threads):
            tokens = prompt(int(draw.integers(60)))[: int(draw.integers(SIZE, 21))]
            try:
                cache.run(tokens, b"tenant %d" % draw.integers(2))
            except CacheFull:
                continue
            except Exception as error:
                wrong.append(repr(error))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    cache.core.check_valid()
    ram, disk, _ = cache.stack.tiers
    assert (ram.nbytes() or 0) <= 64_000
    assert (disk.nbytes() or 0) <= 2 << 20
    assert cache.stack.promoted_tokens > 0
    # Acknowledged by flush: everything in the pool and in RAM is on disk.
    assert cache.stack.flush(60, everything=True)
    for one in cache.core.findable_blocks():
        assert disk.contains(tier_key("block", one.group, one.key or b""))
    assert all(disk.contains(item.key) for item in ram.items())
    assert cache.stack.close()
    assert set(threading.enumerate()) <= running
    assert len(os.listdir("/proc/self/fd")) <= files + 1


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files through /proc")
def test_four_threads(tmp_path, valkey_url):
    load(tmp_path, valkey_url, 4, 400)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files through /proc")
def test_sixteen_threads_ten_thousand_requests(tmp_path, valkey_url):
    load(tmp_path, valkey_url, 16, 10_000)
