"""Tiers: a step whose every evicted block is demoted, against the same step without tiers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from measure import Row, Table, alternate, seconds
from smol import checkpoint, prompt

import llama_torch
from kvcache_torch import KVCache

WITHOUT = "the same step without tiers"
TOKENS, POOL = 512, 40
TARGET = 1.05


def main(*, quick: bool = False) -> Table:
    """A prompt of 512 tokens, and 64 decode steps, in a pool that is full of other prompts."""
    prompts, decodes = (9, 5) if quick else (31, 11)
    model = llama_torch.from_checkpoint(checkpoint())
    caches = {"ours": KVCache(POOL, tiers=["ram:2GiB"]), WITHOUT: KVCache(POOL)}
    seeds = count()
    prefill = {name: _prefill(model, cache, seeds) for name, cache in caches.items()}
    decode = {name: _decode(model, cache, seeds) for name, cache in caches.items()}
    rows = [
        Row.of(
            f"prompt of {TOKENS} tokens",
            "ms",
            alternate(prefill, prompts, "demoting, prompt"),
            targets={WITHOUT: TARGET},
        ),
        Row.of(
            "decode step, 64 of them",
            "ms a step",
            alternate(decode, decodes, "demoting, decode"),
            targets={WITHOUT: TARGET},
        ),
    ]
    stats = caches["ours"].stats()
    if not stats.demoted_blocks or stats.dropped_blocks:
        raise AssertionError(f"demoted {stats.demoted_blocks}, dropped {stats.dropped_blocks}")
    caches["ours"].close()
    text = [
        f"A pool of {POOL} blocks full of other prompts: every block that a step takes is evicted and goes to a RAM "
        f"tier. Demoted: {stats.demoted_blocks} blocks, dropped: {stats.dropped_blocks}. Each run computes new tokens; "
        "the writer thread works meanwhile, on the same cores.",
    ]
    return Table("tiers_step", "Tiers: a step that demotes all it evicts", text, rows)


def _prefill(model: torch.nn.Module, cache: KVCache, seeds: count[int]) -> Callable[[], float]:
    def run() -> float:
        cache.attach(model, outputs="last")
        tokens = prompt(TOKENS, seed=next(seeds))
        seq = cache.open(tokens)
        took = seconds(lambda: cache.step([seq], [tokens])) * 1e3
        seq.close()
        cache.flush()
        cache.detach()
        return took

    return run


def _decode(model: torch.nn.Module, cache: KVCache, seeds: count[int]) -> Callable[[], float]:
    def run() -> float:
        cache.attach(model, outputs="last")
        tokens = prompt(64, seed=next(seeds))
        seq = cache.open(tokens[:1])

        def steps() -> None:
            for token in tokens:
                cache.step([seq], [[token]])

        took = seconds(steps) * 1e3 / 64
        seq.close()
        cache.flush()
        cache.detach()
        return took

    return run
