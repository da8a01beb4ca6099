"""Many threads on one cache: nothing is lost, and every block is accounted for."""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter

from kvcache_core import BlockCache, BlockLayout, CacheFull, InvalidInput, LayerSpec

THREADS, SEQUENCES = 8, 200


def _one_sequence(core, rng, met):
    prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 12))]
    seq = core.open(prompt, rng.choice([b"", b"a"]))
    tokens, rest = prompt[: seq.num_cached], prompt[seq.num_cached :]
    met["hits"] += seq.num_cached > 0
    children = []
    for _ in range(rng.randrange(1, 5)):
        new, rest = (rest or [rng.randrange(3) for _ in range(rng.randrange(1, 6))]), []
        try:
            plan = core.plan([seq], [new])
        except CacheFull:
            met["CacheFull"] += 1
            break
        if rng.random() < 0.2:
            core.rollback(plan)
            met["rollback"] += 1
        else:
            core.commit(plan)
            tokens += new
        assert seq.tokens == tokens
        if rng.random() < 0.3:
            children.append((seq.fork(), list(tokens)))
        if tokens and rng.random() < 0.3:
            length = rng.randrange(len(tokens) + 1)
            try:
                seq.truncate(length)
            except InvalidInput:
                met["truncate refused"] += 1
            else:
                del tokens[length:]
                met["truncate"] += 1
    for child, past in children:
        assert child.tokens == past
        try:
            core.commit(core.plan([child], [[7]]))
        except CacheFull:
            met["CacheFull"] += 1
        else:
            assert child.tokens == [*past, 7]
        child.close()
    assert seq.tokens == tokens
    seq.close()
    met["done"] += 1


def _hammer(core):
    failures: list[BaseException] = []
    counters = [Counter() for _ in range(THREADS)]
    start = threading.Barrier(THREADS)

    def work(number):
        rng = random.Random(number)
        start.wait()
        try:
            for _ in range(SEQUENCES):
                _one_sequence(core, rng, counters[number])
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if failures:
        raise failures[0]
    return sum(counters, Counter())


def _check(core, met):
    core.check_valid()
    stats = core.stats()
    assert met["done"] == THREADS * SEQUENCES
    assert (stats.live_blocks, stats.open_sequences) == (0, 0)
    assert stats.free_blocks + stats.cached_blocks == stats.num_blocks
    for name in ("hits", "rollback", "truncate", "CacheFull"):
        assert met[name], f"never met: {name}"
    assert stats.evicted_blocks > 0
    core.clear()
    core.check_valid()
    assert core.stats().free_blocks == stats.num_blocks
    assert len(core._index) == 0


def test_eight_threads_on_one_small_cache():
    core = BlockCache(24, 3)
    _check(core, _hammer(core))


def test_eight_threads_over_full_and_window_layers():
    layout = BlockLayout([LayerSpec.attention(1, 1), LayerSpec.attention(1, 1, window=4)], 3)
    core = BlockCache(24, layout=layout)
    _check(core, _hammer(core))
