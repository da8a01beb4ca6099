"""Keras: decode attention alone, of rows that share some of their past.

`python tests/bench/keras_attention.py` shows from where on sharing pays: what `packing.WORTH` is set by.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from measure import Row, Table, alternate, seconds

from kvcache_core import BlockCache, BlockLayout, LayerSpec
from kvcache_core.sequence import Sequence
from kvcache_keras import packing
from kvcache_keras.kernels import Scoring, attend
from kvcache_keras.packing import pack, shared_cuts, signature
from kvcache_keras.step import Step
from kvcache_keras.store import TensorStore

HEADS, KV_HEADS, SIZE, LAYERS, BLOCKS, BLOCK = 9, 3, 64, 30, 256, 16
HAND, CONCATENATED, PER_ROW = "preallocated", "concatenation", "our pool, gathered per row"
OWN = 128
CASES = ((8, 1920), (8, 512))
"""Rows, and the tokens that they share."""
AROUND_WORTH = ((2, 1024), (2, 1920), (4, 256), (4, 512), (8, 128), (8, 256))
STEPS = 3
SCORING = Scoring()
New = tuple[tf.Tensor, tf.Tensor, tf.Tensor]


def layers_over_pool(store: TensorStore, new: New, levels: int) -> Any:
    """One step's attention in every layer, as a graph over a packed plan."""

    def run(*packed: tf.Tensor) -> tf.Tensor:
        step = Step(store, "float32", packed, last_only=True, levels=levels)
        q, k, v = new
        for layer in range(LAYERS):
            q = step.attend(q, k, v, layer, SCORING)
        return q

    return tf.function(run, input_signature=signature(["attention"], BLOCK, 1, levels=levels), autograph=False)


def layers_over_tensors(keys: list[tf.Tensor], values: list[tf.Tensor], new: New, *, concatenate: bool) -> Any:
    """The same over K/V of its own for every row, [B, H, S, D] in every layer."""

    def run(keys: list[tf.Tensor], values: list[tf.Tensor]) -> tf.Tensor:
        q, k, v = new
        k, v = (tf.transpose(x, (0, 2, 1, 3)) for x in (k, v))
        for layer in range(LAYERS):
            all_k, all_v = keys[layer], values[layer]
            if concatenate:
                all_k, all_v = tf.concat((all_k[:, :, :-1], k), 2), tf.concat((all_v[:, :, :-1], v), 2)
            q = attend(q, all_k, all_v, None, SCORING)
        return q

    graph = tf.function(run, autograph=False)
    return lambda: graph(keys, values)


def random(*shape: int) -> tf.Tensor:
    """Normal float32 numbers."""
    return tf.random.stateless_normal(shape, (0, 0))


def opened(core: BlockCache, rows: int, shared: int) -> list[Sequence]:
    """Rows that share their first tokens, and have others behind them."""
    parent = core.open(range(shared))
    core.commit(core.plan([parent], [range(shared)]))
    seqs = []
    for row in range(rows):
        tokens = [*range(shared), *range(10_000 * (row + 1), 10_000 * (row + 1) + OWN - 1)]
        seqs.append(core.open(tokens, max_new_tokens=16))
        core.commit(core.plan([seqs[-1]], [tokens[seqs[-1].num_cached :]]))
    return seqs


def compare(store: TensorStore, rows: int, shared: int, runs: int) -> Row:
    """Ours, and K/V of its own for every row."""
    core = BlockCache(BLOCKS, layout=store.layout)
    seqs, length = opened(core, rows, shared), shared + OWN
    new = random(rows, 1, HEADS, SIZE), random(rows, 1, KV_HEADS, SIZE), random(rows, 1, KV_HEADS, SIZE)
    keys, values = ([random(rows, KV_HEADS, length, SIZE) for _ in range(LAYERS)] for _ in "kv")

    def over_pool(levels: int) -> Any:
        graph = layers_over_pool(store, new, levels)

        def step() -> tf.Tensor:
            plan = core.plan(seqs, [[1]] * rows)
            result = graph(*pack(plan, store, shared_cuts(plan, store) if levels else ()))
            core.rollback(plan)
            return result

        return step

    candidates = {
        "ours": over_pool(1),
        PER_ROW: over_pool(0),
        HAND: layers_over_tensors(keys, values, new, concatenate=False),
        CONCATENATED: layers_over_tensors(keys, values, new, concatenate=True),
    }
    np.testing.assert_allclose(candidates["ours"](), candidates[PER_ROW](), atol=1e-5, rtol=1e-4)

    def timed(call: Any) -> float:
        return seconds(lambda: [call().numpy() for _ in range(STEPS)]) * 1e3 / STEPS / LAYERS

    case = f"{rows} rows x {length:,} tokens, {shared:,} of them shared"
    timers = {name: (lambda call=call: timed(call)) for name, call in candidates.items()}
    samples = alternate(timers, runs, f"Keras, attention, {case}")
    targets = {PER_ROW: 0.5} if (rows, shared) == CASES[0] else {}
    return Row.of(case, "ms/layer", samples, targets=targets)


def filled_store() -> TensorStore:
    """A pool of random K/V."""
    layout = BlockLayout([LayerSpec.attention(KV_HEADS, SIZE)] * LAYERS, BLOCK)
    store = TensorStore(layout, BLOCKS)
    for layer in range(LAYERS):
        for name in "kv":
            store.array(layer, name).assign(random(KV_HEADS * store.stride, BLOCK, SIZE))
    return store


def main(*, quick: bool = False) -> Table:
    """Rows that share much."""
    store = filled_store()
    rows = [compare(store, rows, shared, 5 if quick else 15) for rows, shared in CASES]
    text = [
        f"{HEADS} query and {KV_HEADS} K/V heads of {SIZE}, one new token per row, through {LAYERS} layers with K/V of "
        "their own. Ours plans the step, writes the new K/V and attends; block tables alone say what is shared. "
        "Preallocated writes nothing and only attends.",
    ]
    return Table("keras_attention", "Keras: decode attention of rows that share a prefix", text, rows)


def around_worth() -> None:
    """Ours by row, over every number of bytes that sharing spares."""
    packing.WORTH, store = 0, filled_store()
    for rows, shared in AROUND_WORTH:
        ratio = compare(store, rows, shared, 9).ratios[PER_ROW].median
        print(f"{rows} rows, {shared} shared: {(rows - 1) * shared * store.bytes_per_token[0]:,} bytes, {ratio:.2f}")


if __name__ == "__main__":
    around_worth()
