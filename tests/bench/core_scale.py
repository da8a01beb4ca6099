"""What an operation costs in pools of a thousand to a million blocks, full and evicting. No framework."""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
from measure import Row, Spread, Table

from kvcache_core import BlockCache

BLOCK_SIZE = 16
SIZES = (1_000, 10_000, 100_000, 1_000_000)
HEAD_BLOCKS, OWN_BLOCKS, NEW_TOKENS = 32, 32, 64


class Load:
    """Requests of one shared head and own tokens on one pool, closed at once."""

    def __init__(self, num_blocks: int) -> None:
        start = time.perf_counter()
        self.core = BlockCache(num_blocks, BLOCK_SIZE)
        self.build_ms = (time.perf_counter() - start) * 1e3
        self.rng = np.random.default_rng(0)
        self.head = self.rng.integers(0, 2**30, HEAD_BLOCKS * BLOCK_SIZE).tolist()

    def fill(self) -> None:
        """Until the pool evicts."""
        while not self.core.stats().evicted_blocks:
            self.run(10)

    def run(self, count: int) -> tuple[float, float]:
        """Microseconds per prompt (open, plan, commit, close) and nanoseconds per appended token."""
        prompts = self.rng.integers(0, 2**30, (count, OWN_BLOCKS * BLOCK_SIZE)).tolist()
        whole = appended = 0
        for own in prompts:
            prompt = self.head + own
            start = time.thread_time_ns()
            seq = self.core.open(prompt)
            self.core.commit(self.core.plan([seq]))
            middle = time.thread_time_ns()
            for token in own[:NEW_TOKENS]:
                self.core.append(seq, token)
            end = time.thread_time_ns()
            self.core.close(seq)
            whole += time.thread_time_ns() - end + middle - start
            appended += end - middle
        return whole / count / 1e3, appended / count / NEW_TOKENS


class Strangers:
    """One-block prompts that have nothing in common: as many children of one node as the pool has blocks."""

    def __init__(self, num_blocks: int) -> None:
        self.core = BlockCache(num_blocks, BLOCK_SIZE)
        self.rng = np.random.default_rng(0)

    def prompts(self, count: int) -> list[list[int]]:
        return self.rng.integers(0, 2**30, (count, BLOCK_SIZE)).tolist()

    def fill(self) -> None:
        """Until the pool evicts; many in one step, which is faster."""
        rows = min(200, self.core.num_blocks // 2)
        while not self.core.stats().evicted_blocks:
            prompts = self.prompts(rows)
            seqs = [self.core.open(prompt) for prompt in prompts]
            self.core.commit(self.core.plan(seqs))
            for seq in seqs:
                self.core.close(seq)

    def run(self, count: int) -> float:
        """Microseconds per request: open, plan, commit, close."""
        prompts = self.prompts(count)
        start = time.thread_time_ns()
        for prompt in prompts:
            seq = self.core.open(prompt)
            self.core.commit(self.core.plan([seq]))
            self.core.close(seq)
        return (time.thread_time_ns() - start) / count / 1e3


def main(*, quick: bool = False) -> Table:
    """Each pool size."""
    rows = []
    for size in SIZES[:-1] if quick else SIZES:
        load = Load(size)
        load.fill()
        load.run(50)
        found = [load.run(50 if quick else 200) for _ in range(5 if quick else 9)]
        strangers = Strangers(size)
        strangers.fill()
        short = [strangers.run(200) for _ in range(5 if quick else 9)]
        row = Row(f"pool of {size:,} blocks", "µs/prompt", Spread.of(prompt for prompt, _ in found))
        row.extra = {
            "blocks": size,
            "ns/append": statistics.median(append for _, append in found),
            "µs/one-block prompt": statistics.median(short),
            "ms to make the pool": load.build_ms,
        }
        rows.append(row)
    text = [
        f"A full pool that evicts for every request. A prompt of {HEAD_BLOCKS + OWN_BLOCKS} blocks of {BLOCK_SIZE} "
        f"tokens, {HEAD_BLOCKS} of them cached: open, plan, commit, close; then {NEW_TOKENS} appends, of which every "
        "sixteenth takes a new block. One-block prompts have nothing in common: all are children of one node, as many "
        "as the pool has blocks. Processor time. The chart is `core_scale.svg` beside this page.",
        "About once in as many releases as the pool has blocks the LRU queue is written anew; in a pool of a million "
        "blocks a run that meets this is the upper end of the range.",
    ]
    return Table("core_scale", "Cost of an operation against the size of the pool", text, rows)


if __name__ == "__main__":
    sys.exit("run `python tests/bench/run.py --only core_scale`")
