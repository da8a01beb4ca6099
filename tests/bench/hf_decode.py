"""transformers: one decode step over a long past, against `DynamicCache`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from hf_smol import filled, model, plain_past
from measure import Row, Table, alternate, seconds

from kvcache_torch import KVCache

THEIRS = "DynamicCache"
CASES = ((1, 4096, 0, 0.95), (8, 2048, 0, 0.7), (8, 2048, 1920, 0.7))


def main(*, quick: bool = False) -> Table:
    """Steps of one token per row."""
    rows = [_case(*case, runs=7 if quick else 15) for case in CASES]
    text = [
        "`model(ids, cache=...)` of SmolLM2 in transformers, one new token per row; K and V of the past are random, as "
        "only the time counts. The past grows by one token per run, in both. Ours after `cache.compile()`.",
    ]
    return Table("hf_decode", "transformers: decode step", text, rows)


def _case(rows: int, length: int, shared: int, target: float, *, runs: int) -> Row:
    lm = model()
    cache = KVCache(size=rows * (length // 16 + 8) + 8)
    cache.attach(lm, outputs="last")
    cache.compile()
    pasts = {"ours": filled(cache, rows, length, shared=shared), THEIRS: plain_past(rows, length)}
    ids = torch.full((rows, 1), 200)

    def step(name: str) -> float:
        past: Any = pasts[name]
        where = torch.full((rows, 1), past.get_seq_length())
        with torch.no_grad():
            return seconds(lambda: lm(ids, position_ids=where, cache=past, use_cache=True, logits_to_keep=1)) * 1e3

    samples = alternate({name: partial(step, name) for name in pasts}, runs, f"decode {rows} x {length}")
    pasts.clear()
    cache.detach()
    case = f"{rows} x {length:,} tokens" + (f", {shared:,} shared" if shared else "")
    return Row.of(case, "ms", samples, targets={THEIRS: target})
