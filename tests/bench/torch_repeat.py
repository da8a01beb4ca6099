"""PyTorch: the same long prompt a second time."""

from __future__ import annotations

from itertools import count

import numpy as np
import torch
from measure import Row, Table, alternate, seconds
from smol import checkpoint, prompt

import llama_torch
from kvcache_torch import KVCache

LENGTH = 4096
COLD = "cold prefill"


def main(*, quick: bool = False) -> Table:
    """Time to first token, warm against cold; by sequences and by `with cache: model(x)`."""
    runs = 5 if quick else 7
    model = llama_torch.from_checkpoint(checkpoint())
    cache = KVCache(size=2 * LENGTH // 16 + 16)
    cache.attach(model, outputs="last")
    cache.compile()
    tokens = prompt(LENGTH, seed=0)
    cache.warm([tokens])
    seeds = count(1)
    cold = KVCache(size=LENGTH // 16 + 16)
    twin = llama_torch.from_checkpoint(checkpoint())
    cold.attach(twin, outputs="last")

    def first_token(of: KVCache, ids: list[int]) -> int:
        seq = of.open(ids)
        token = int(np.argmax(of.step([seq], [ids[seq.num_cached :]])[0]))
        seq.close()
        return token

    def transparent() -> int:
        with torch.inference_mode(), cache:
            return int(model(x)[0, -1].argmax())

    x = torch.tensor([tokens])
    if first_token(cache, tokens) != transparent():
        raise AssertionError("both ways must choose the same token")
    transparently = "`with cache: model(x)`"
    samples = alternate(
        {
            "ours": lambda: seconds(lambda: first_token(cache, tokens)) * 1e3,
            transparently: lambda: seconds(transparent) * 1e3,
            COLD: lambda: seconds(lambda: first_token(cold, prompt(LENGTH, seed=next(seeds)))) * 1e3,
        },
        runs,
        "a prompt again",
    )
    mine = {"ours": samples[transparently], COLD: samples[COLD]}
    rows = [
        Row.of(f"{LENGTH:,} tokens again", "ms to first token", samples, targets={COLD: 0.012}),
        Row.of(f"{LENGTH:,} tokens again, {transparently}", "ms", mine, targets={COLD: 0.012}),
    ]
    text = ["Open, plan, model, commit and choosing the token, after `cache.compile()`, against a cold prompt as long."]
    return Table("torch_repeat", "PyTorch: a prompt that came before", text, rows)
