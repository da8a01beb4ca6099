"""The bookkeeping alone: one request's cost, and a serving workload that overflows the pool. No framework."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from measure import Row, Spread, Table, alternate

from kvcache_core import BlockCache, Sequence

BLOCK_SIZE = 16
VOCABULARY = 128_000
PREFIXES, PREFIX_TOKENS, OWN_TOKENS, NEW_TOKENS, LIVE = 64, 1024, 1024, 128, 32
POOL_BLOCKS = 65_536
REQUESTS = 2000

# Microseconds per request of the whole workload (all 2,000 requests, wall time, two runs each), measured once on the
# same machine with the peers' own code, not in turns with ours: three of the fastest.
PEERS = {
    "vLLM 0.33 KVCacheManager, sha256, appends one by one": (1968, 2546),
    "SGLang 0.5.23 RadixCache, appends in one step": (2041, 2389),
    "nano-vllm BlockManager, appends one by one": (18405, 19455),
}


class Manager(Protocol):
    """What the workload asks of a block manager."""

    def start(self, tokens: list[int]) -> tuple[object, int]:
        """Open a request and hold its prompt; returns it and how many prompt tokens were cached."""

    def append(self, request: object, token: int) -> None:
        """Hold one more token."""

    def append_batch(self, requests: list[object], tokens: list[int]) -> None:
        """Hold one more token of each request."""

    def finish(self, request: object) -> None:
        """Give the request's room back; what it held stays findable."""

    def stats(self) -> dict[str, int]:
        """Counters; `evicted_blocks` among them."""


class CoreManager:
    """`BlockCache`, through its public calls: a prompt is a planned and committed step, a further token an append."""

    name = "kvcache_core"

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.core = BlockCache(num_blocks=num_blocks, block_size=block_size)

    def start(self, tokens: list[int]) -> tuple[Sequence, int]:
        seq = self.core.open(tokens)
        self.core.commit(self.core.plan([seq], [tokens[seq.num_cached :]]))
        return seq, seq.num_cached

    def append(self, request: Sequence, token: int) -> None:
        self.core.append(request, token)

    def append_batch(self, requests: list[Sequence], tokens: list[int]) -> None:
        self.core.append(requests, tokens)

    def finish(self, request: Sequence) -> None:
        self.core.close(request)

    def stats(self) -> dict[str, int]:
        return {"evicted_blocks": self.core.stats().evicted_blocks}


@dataclass
class Request:
    """One request of the workload and how far it is."""

    prompt: list[int]
    answer: list[int]
    handle: object = None
    done: int = 0


def requests(count: int, seed: int = 1) -> Iterator[Request]:
    """Prompts of a shared prefix (popularity ~ 1 / rank) and as many tokens of their own, each with its answer."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, VOCABULARY, (PREFIXES, PREFIX_TOKENS))
    popularity = 1 / np.arange(1, PREFIXES + 1)
    popularity /= popularity.sum()
    for prefix in rng.choice(PREFIXES, count, p=popularity):
        own = rng.integers(0, VOCABULARY, OWN_TOKENS + NEW_TOKENS).tolist()
        yield Request(shared[prefix].tolist() + own[:OWN_TOKENS], own[OWN_TOKENS:])


class Stopwatch:
    """Adds up the time spent in the manager, not in the workload around it."""

    def __init__(self) -> None:
        self.total = 0

    def __call__(self, function: Callable[..., object], *args: object) -> object:
        start = time.thread_time_ns()
        result = function(*args)
        self.total += time.thread_time_ns() - start
        return result


def serve(manager: Manager, count: int, *, batched: bool) -> dict[str, float]:
    """Run the workload: one request leaves and one comes, then each live one gets a few tokens."""
    watch, live, hits, prompt_tokens = Stopwatch(), deque[Request](), 0, 0
    coming = requests(count)
    per_arrival = NEW_TOKENS // LIVE
    arrival = next(coming, None)
    while arrival or live:
        if len(live) == LIVE or not arrival:
            watch(manager.finish, live.popleft().handle)
        if arrival:
            arrival.handle, cached = watch(manager.start, arrival.prompt)  # type: ignore[misc]
            hits += cached
            prompt_tokens += len(arrival.prompt)
            live.append(arrival)
            arrival = next(coming, None)
        for _ in range(per_arrival):
            growing = [request for request in live if request.done < NEW_TOKENS]
            tokens = [request.answer[request.done] for request in growing]
            if batched and growing:
                watch(manager.append_batch, [request.handle for request in growing], tokens)
            for request, token in zip(growing, tokens, strict=True):
                request.done += 1
                if not batched:
                    watch(manager.append, request.handle, token)
    evicted = manager.stats()["evicted_blocks"]
    return {
        "us": watch.total / count / 1e3,
        "requests/s": count / (watch.total / 1e9),
        "hit %": 100 * hits / prompt_tokens,
        "evicted blocks": evicted,
    }


def one_request(core: BlockCache, prompt: list[int], answer: list[int]) -> None:
    """Open, hold the prompt, append the answer token by token, close."""
    seq = core.open(prompt)
    core.commit(core.plan([seq], [prompt[seq.num_cached :]]))
    for token in answer:
        core.append(seq, token)
    core.close(seq)


def micro(runs: int, count: int) -> Row:
    """Microseconds per request on a pool that holds everything, each prompt new."""
    core = BlockCache(num_blocks=POOL_BLOCKS, block_size=BLOCK_SIZE)
    rng = np.random.default_rng(7)

    def run() -> float:
        prompts = rng.integers(0, VOCABULARY, (count, 2048)).tolist()
        answers = rng.integers(0, VOCABULARY, (count, NEW_TOKENS)).tolist()
        start = time.thread_time()
        for prompt, answer in zip(prompts, answers, strict=True):
            one_request(core, prompt, answer)
        return (time.thread_time() - start) / count * 1e6

    case = "one request alone: open, prompt of 2,048 tokens, 128 appends, close"
    return Row.of(case, "µs/request", alternate({"ours": run}, runs, "core, one request"))


def serving(runs: int, count: int, *, batched: bool) -> Row:
    """Microseconds per request of the serving workload, beside the peers' earlier figures."""
    results: list[dict[str, float]] = []

    def run() -> float:
        results.append(serve(CoreManager(POOL_BLOCKS, BLOCK_SIZE), count, batched=batched))
        return results[-1]["us"]

    how = "appends of all live requests in one step" if batched else "appends one by one"
    row = Row.of(f"serving, {how}", "µs/request", alternate({"ours": run}, runs, f"core, serving, {how}", warm_up=0))
    row.extra = {name: results[-1][name] for name in ("hit %", "evicted blocks")}
    row.extra["requests/s"] = 1e6 / row.ours.median
    for peer, (low, high) in PEERS.items():
        middle = (low + high) / 2
        row.peers[peer] = Spread(middle, low, high, 2)
        row.ratios[peer] = Spread(row.ours.median / middle, row.ours.low / high, row.ours.high / low, row.ours.runs)
    return row


def main(*, quick: bool = False) -> Table:
    """One request, and the serving workload."""
    count = 300 if quick else REQUESTS
    rows = [micro(7, 10 if quick else 50), *(serving(5, count, batched=batched) for batched in (False, True))]
    text = [
        f"Blocks of {BLOCK_SIZE}, a pool of {POOL_BLOCKS:,} blocks. Serving: {count:,} requests, each one of "
        f"{PREFIXES} shared prefixes of {PREFIX_TOKENS:,} tokens (popularity 1 / rank) and {OWN_TOKENS:,} tokens of "
        f"its own, then {NEW_TOKENS} tokens one at a time; {LIVE} requests live. From request 860 on the pool "
        "overflows and evicts.",
        "Processor time of the core alone (it uses one thread). The peers' figures are from an earlier run of the same "
        f"workload with all {REQUESTS:,} requests on this machine, not in turns with ours.",
    ]
    return Table("core_workload", "Bookkeeping without a model", text, rows)


if __name__ == "__main__":
    sys.exit("run `python tests/bench/run.py --only core_workload`")
