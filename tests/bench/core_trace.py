"""A real hour of conversations (Mooncake's public trace), replayed in full at several capacities. No framework."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from measure import Row, Table, alternate

from tests.naive_lru import NaiveLru, Replay, Request

BLOCK_SIZE = 512
PERCENT = (1, 2, 5, 10, 20, 50, 100)
PATH = "KVCACHE_TRACE"


def load(path: Path) -> list[Request]:
    """The trace's requests, in order."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [Request(tuple(line["hash_ids"]), max(1, line["output_length"])) for line in lines]


def working_set(requests: list[Request]) -> int:
    """Blocks that hold every prompt and every answer of the trace once."""
    answers = sum(-(-request.new_tokens // BLOCK_SIZE) for request in requests)
    return len({block for request in requests for block in request.ids}) + answers


def replay(kind: type[Replay] | type[NaiveLru], blocks: int, requests: list[Request], hits: list[int]) -> float:
    """Microseconds per request; the blocks that were found are added to ``hits``."""
    cache = kind(*((blocks, BLOCK_SIZE) if kind is Replay else (blocks,)))  # type: ignore[arg-type]
    start = time.thread_time()
    for number, request in enumerate(requests):
        cache.serve(number, request, BLOCK_SIZE)
    hits.append(cache.hit_blocks)
    return (time.thread_time() - start) / len(requests) * 1e6


def capacity(percent: int, requests: list[Request], runs: int) -> Row:
    """One capacity. Raises if the block cache does not find exactly what the naive simulation finds."""
    blocks = max(1, working_set(requests) * percent // 100)
    ours: list[int] = []
    naive: list[int] = []
    replay(NaiveLru, blocks, requests, naive)
    case = f"capacity {percent} % ({blocks:,} blocks)"
    samples = alternate({"ours": lambda: replay(Replay, blocks, requests, ours)}, runs, f"trace, {case}", warm_up=0)
    if set(ours) != set(naive):
        raise RuntimeError(f"{case}: the block cache found {ours} blocks, a naive LRU finds {naive}")
    row = Row.of(case, "µs/request", samples)
    prompt_blocks = sum(len(request.ids) for request in requests)
    row.extra = {"hit %": 100 * ours[0] / prompt_blocks, "naive LRU hit %": 100 * naive[0] / prompt_blocks}
    row.extra["requests/s"] = 1e6 / row.ours.median
    return row


def main(*, quick: bool = False) -> Table:
    """The trace at `KVCACHE_TRACE`, or a table that says it is not there."""
    path = Path(os.environ.get(PATH, ""))
    title = "Bookkeeping of an hour of real conversations"
    if not path.is_file():
        return Table("core_trace", title, [f"Skipped: `{PATH}` names no file (a trace of the Mooncake project)."], [])
    requests = load(path)[: 2000 if quick else None]
    text = [
        f"{len(requests):,} requests of the Mooncake project's public conversation trace (FAST 2025), one by one, "
        f"in blocks of {BLOCK_SIZE} tokens: prompts of {sum(len(r.ids) for r in requests) * BLOCK_SIZE:,} tokens "
        "together, each id its own 512 token ids, and answers of the length in the trace. 100 % holds all.",
        "The hit ratio is checked to be exactly that of a naive LRU simulation (`tests/naive_lru.py`). Time includes "
        "making the token arrays.",
    ]
    percent = (1, 10, 100) if quick else PERCENT
    return Table("core_trace", title, text, [capacity(one, requests, 1 if quick else 5) for one in percent])


if __name__ == "__main__":
    sys.exit("run `KVCACHE_TRACE=FILE python tests/bench/run.py --only core_trace`")
