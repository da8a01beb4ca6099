"""Many threads over three tiers: nothing wrong, nothing lost that was acknowledged, nothing left behind."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcache_core import BlockLayout, CacheFull, LayerSpec
from kvcache_core.opentiers import tier_key
from kvcache_core.store import NumpyStore
from tests.tiers.test_tiering import SIZE, Cache, prompt

LARGE = BlockLayout([LayerSpec.attention(2, 512), LayerSpec.attention(1, 512, window=6)], SIZE)
"""Its 64 blocks are 3 MiB, and what all prompts need, 28 MiB, is far more than the RAM tier's 2 MiB."""

ALLOWANCE = 12 << 20
"""Bytes for what is copied at the moment, stacks of the threads, bookkeeping, and what ``malloc`` keeps."""


def memory() -> int:
    """Bytes of this process in memory, without the pages of files: the disk tier's are the kernel's to take back."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, "Linux since 4.5 tells it"
    return int(found[1]) * 1024


def run_when_there_is_room(cache: Cache, tokens: list[int], salt: bytes) -> bool:
    """Others may hold all blocks at the moment: that is no answer yet."""
    while True:
        try:
            cache.run(tokens, salt)
            return True
        except CacheFull:
            time.sleep(0.001)


def load(
    tmp_path: Any,
    url: str,
    threads: int,
    requests: int,
    ram_bytes: int = 64_000,
    disk_bytes: int = 2 << 20,
    **options: Any,
) -> int:
    """Returns the most memory of the process that was seen while requests were served."""
    running, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    cache = Cache(64, [f"ram:{ram_bytes}B", f"disk:{tmp_path}?max={disk_bytes}B&sync=off", url], **options)
    wrong: list[str] = []
    most, served = [0] * threads, [0] * threads

    def work(number: int) -> None:
        draw = np.random.default_rng(number)
        for _ in range(requests // threads):
            tokens = prompt(int(draw.integers(60)))[: int(draw.integers(SIZE, 21))]
            try:
                served[number] += run_when_there_is_room(cache, tokens, b"tenant %d" % draw.integers(2))
            except Exception as error:
                wrong.append(repr(error))
            most[number] = max(most[number], memory())

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    assert served == [requests // threads] * threads, "each answered, every slot checked"
    cache.core.check_valid()
    ram, disk, _ = cache.stack.tiers
    assert (ram.nbytes() or 0) <= ram_bytes
    assert (disk.nbytes() or 0) <= disk_bytes
    assert cache.stack.promoted_tokens > 0
    # Acknowledged by flush: everything in the pool and in RAM is on disk.
    assert cache.stack.flush(60, everything=True)
    for one in cache.core.findable_blocks():
        assert disk.contains(tier_key("block", one.group, one.key or b""))
    assert all(disk.contains(item.key) for item in ram.items())
    assert cache.stack.close()
    assert set(threading.enumerate()) <= running
    assert len(os.listdir("/proc/self/fd")) <= files
    return max(most)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files through /proc")
def test_four_threads(tmp_path, valkey_url):
    load(tmp_path, valkey_url, 4, 400)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files and memory through /proc")
def test_sixteen_threads_ten_thousand_requests(tmp_path, valkey_url):
    load(tmp_path / "warm up", valkey_url, 4, 400)
    before, ram, queue = memory(), 2 << 20, 4 << 20
    disk = 16 << 20  # holds the pool and the RAM tier
    most = load(tmp_path / "load", valkey_url, 16, 10_000, ram, disk, layout=LARGE, queue_bytes=queue)
    assert most - before <= NumpyStore(LARGE, 64).nbytes + ram + queue + ALLOWANCE
