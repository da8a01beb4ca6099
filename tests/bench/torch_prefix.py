"""PyTorch: time to first token of a request whose long prefix another request has computed before."""

from __future__ import annotations

from itertools import count

import numpy as np
from measure import Row, Table, alternate, seconds
from preallocated import Preallocated
from smol import checkpoint, prompt

import llama_torch
from kvcache_torch import KVCache

SHARED, OWN = 1024, 64
ALONE, FROM_SCRATCH = "64 tokens alone, hand-written cache", "whole prompt, no reuse"
TARGET = 1.15


def main(*, quick: bool = False) -> Table:
    """The second request against 64 tokens alone, and against no reuse."""
    runs = 5 if quick else 9
    model = llama_torch.from_checkpoint(checkpoint())
    cache = KVCache(size=SHARED // 16 + (runs + 4) * (OWN // 16 + 1) + 8)
    cache.attach(model, outputs="last")
    shared = prompt(SHARED, seed=1)
    cache.warm([shared + prompt(OWN, seed=2)])
    alone = Preallocated(model, SHARED + OWN, folded=True)
    alone.step(shared)
    seeds, first_tokens = count(3), dict[str, int]()
    own: list[int] = []

    def second_request() -> float:
        nonlocal own
        own = prompt(OWN, seed=next(seeds))

        def answer() -> None:
            tokens = shared + own
            seq = cache.open(tokens)
            first_tokens["ours"] = int(np.argmax(cache.step([seq], [tokens[seq.num_cached :]])[0]))
            reused.append(seq.num_cached)
            seq.close()

        return seconds(answer) * 1e3

    def hand_written() -> float:
        alone.length = SHARED

        def answer() -> None:
            first_tokens["alone"] = int(alone.step(own).argmax())

        return seconds(answer) * 1e3

    def from_scratch() -> float:
        scratch.length = 0
        return seconds(lambda: int(scratch.step(shared + own).argmax())) * 1e3

    reused: list[int] = []
    scratch = Preallocated(model, SHARED + OWN, folded=True)
    own = prompt(OWN, seed=0)
    samples = alternate(
        {"ours": second_request, ALONE: hand_written, FROM_SCRATCH: from_scratch}, runs, "PyTorch, shared prefix"
    )
    # Both answer the same tokens once more: the choice must be the same.
    second_request()
    hand_written()
    if len(set(first_tokens.values())) > 1 or min(reused) < SHARED:
        raise AssertionError(f"chose {first_tokens}, reused {min(reused)} of {SHARED} tokens")
    case = f"{SHARED:,} shared + {OWN} own tokens"
    row = Row.of(case, "ms to first token", samples, targets={ALONE: TARGET})
    text = [
        f"A request with {OWN} tokens of its own behind {SHARED:,} that another request computed: open, plan, model, "
        f"commit, choose. Compared with those {OWN} tokens on a hand-written cache that holds the {SHARED:,} already.",
    ]
    return Table("torch_prefix", "PyTorch: second request that shares a prefix", text, [row])
