"""transformers: memory of the cache for ragged rows."""

from __future__ import annotations

import numpy as np
from hf_smol import model
from measure import Row, Table
from smol import prompt

from kvcache_torch import KVCache

ROWS, SHORTEST, LONGEST = 32, 64, 2048
DYNAMIC, STATIC, LIVE = "DynamicCache, padded", "StaticCache", "bytes of the live tokens"


def main(*, quick: bool = False) -> Table:
    """Bytes of K and V that a batch of 32 rows of different lengths holds."""
    lm = model()
    lengths = np.random.default_rng(0).integers(SHORTEST, LONGEST + 1, ROWS).tolist()
    config = lm.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    cache = KVCache(size=sum(-(-length // 16) for length in lengths))
    cache.attach(lm, outputs="last")
    core = cache.core
    for row, length in enumerate(lengths):
        seq = core.open(prompt(length, seed=row))
        core.commit(core.plan([seq], [prompt(length, seed=row)]))
    for layer in range(config.num_hidden_layers):  # allocate, as a step would
        cache.store.array(layer, "k")
        cache.store.array(layer, "v")
    found = {
        "ours": cache.stats().bytes,
        LIVE: sum(lengths) * per_token,
        DYNAMIC: ROWS * max(lengths) * per_token,
        STATIC: ROWS * LONGEST * per_token,
    }
    cache.detach()
    samples = {name: [size / 1e6] for name, size in found.items()}
    row = Row.of(f"{ROWS} rows of {SHORTEST} to {LONGEST:,} tokens", "MB", samples, targets={LIVE: 1.06})
    text = [
        "Bytes allocated for K and V, null block included. `DynamicCache` pads every row to the longest (and holds a "
        "layer twice for a moment in each step, not counted); `StaticCache` is made for the longest that may come. "
        "Ours is what the store has allocated; theirs follows from the shapes of their tensors.",
    ]
    return Table("hf_memory", "transformers: memory of a ragged batch", text, [row])
