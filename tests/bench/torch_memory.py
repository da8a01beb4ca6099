"""PyTorch: a decode step of eight long sequences that share nothing: all there is to do is read memory."""

from __future__ import annotations

import numpy as np
import torch
from measure import Row, Table, alternate, clock, read_bandwidth
from smol import checkpoint, prompt

import llama_torch
from kvcache_torch import KVCache

ROWS, CONTEXT, STEPS = 8, 4096, 3
FLOOR = "floor: weights and live K/V read once"


def main(*, quick: bool = False) -> Table:
    """Ours against the memory."""
    runs = 5 if quick else 9
    model = llama_torch.from_checkpoint(checkpoint())
    room = STEPS * (runs + 2)
    cache = KVCache(size=ROWS * (CONTEXT + room + 32) // 16)
    cache.attach(model, outputs="last")
    cache.compile()
    # Computing 32,768 tokens would take minutes; how long a step takes does not depend on what K and V hold.
    core, store = cache.core, cache.store
    seqs = []
    for row in range(ROWS):
        tokens = prompt(CONTEXT, seed=row)
        seqs.append(cache.open(tokens, max_new_tokens=room))
        core.commit(core.plan([seqs[-1]], [tokens]))
    for layer in range(model.config.num_layers):
        for name in "kv":
            store.array(layer, name).normal_()
    read = read_bandwidth()
    weights = sum(weight.nbytes for weight in model.parameters())
    config = model.config
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    tokens = [1] * ROWS

    def ours() -> float:
        nonlocal tokens
        start = clock()
        for _ in range(STEPS):
            tokens = np.argmax(cache.step(seqs, [[token] for token in tokens]), axis=1).tolist()
        return (clock() - start) / STEPS * 1e3

    def floor() -> float:
        return (weights + per_token * sum(seq.length for seq in seqs)) / read() * 1e3

    samples = alternate({"ours": ours, FLOOR: floor}, runs, "batch 8, context 4,096", warm_up=2)
    case = f"batch {ROWS}, context {CONTEXT:,}, nothing shared"
    text = [
        "The whole step after `cache.compile()`. The floor: bytes of weights and live K/V over the "
        f"read bandwidth that `torch.dot` reaches in the same run, with {torch.get_num_threads()} threads.",
    ]
    return Table(
        "torch_memory",
        "PyTorch: decode step, memory-bound",
        text,
        [Row.of(case, "ms/step", samples, targets={FLOOR: 1.4})],
    )
