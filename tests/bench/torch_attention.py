"""PyTorch: decode attention alone, of rows that share most of their past."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from measure import Row, Table, alternate, seconds

from kvcache_core import BlockCache, BlockLayout, LayerSpec
from kvcache_torch.step import Step
from kvcache_torch.store import TensorStore

ROWS, LENGTH, SHARED, HEADS, KV_HEADS, SIZE, LAYERS = 8, 2048, 1920, 9, 3, 64, 30
HAND, CONCATENATED = "preallocated, enable_gqa", "concatenation"
STEPS = 3


def layers_of(store: TensorStore, plan: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One step's attention in every layer."""
    step = Step(plan, store, torch.float32)
    for layer in range(LAYERS):
        result = step.attend(q, k, v, layer, None, None, None)
    return result


@torch.inference_mode()
def main(*, quick: bool = False) -> Table:
    """Ours against K/V of its own for every row."""
    torch.manual_seed(0)
    layout = BlockLayout([LayerSpec.attention(KV_HEADS, SIZE)] * LAYERS, 16)
    core = BlockCache(2048, layout=layout)
    store = TensorStore(layout, 2048)
    for layer in range(LAYERS):
        for name in "kv":
            store.array(layer, name).normal_()
    parent = core.open(range(SHARED))
    core.commit(core.plan([parent], [range(SHARED)]))
    seqs = []
    for row in range(ROWS):
        tokens = [*range(SHARED), *range(10_000 * (row + 1), 10_000 * (row + 1) + LENGTH - SHARED - 1)]
        seqs.append(core.open(tokens, max_new_tokens=16))
        core.commit(core.plan([seqs[-1]], [tokens[seqs[-1].num_cached :]]))
    q = torch.randn(ROWS, HEADS, 1, SIZE)
    k, v = torch.randn(ROWS, KV_HEADS, 1, SIZE), torch.randn(ROWS, KV_HEADS, 1, SIZE)
    keys = [torch.randn(ROWS, KV_HEADS, LENGTH, SIZE) for _ in range(LAYERS)]
    values = [torch.randn(ROWS, KV_HEADS, LENGTH, SIZE) for _ in range(LAYERS)]

    def ours() -> None:
        for _ in range(STEPS):
            plan = core.plan(seqs, [[1]] * ROWS)
            layers_of(store, plan, q, k, v)
            core.rollback(plan)

    def preallocated() -> None:
        for _ in range(STEPS):
            for layer in range(LAYERS):
                keys[layer][:, :, -1:], values[layer][:, :, -1:] = k, v
                F.scaled_dot_product_attention(q, keys[layer], values[layer], enable_gqa=True)

    def concatenated() -> None:
        for _ in range(STEPS):
            for layer in range(LAYERS):
                all_k = torch.cat((keys[layer][:, :, :-1], k), 2)
                all_v = torch.cat((values[layer][:, :, :-1], v), 2)
                F.scaled_dot_product_attention(q, all_k, all_v, enable_gqa=True)

    check(core, store, seqs, q, k, v)
    per_layer = 1e3 / STEPS / LAYERS
    candidates = {"ours": ours, HAND: preallocated, CONCATENATED: concatenated}
    samples = alternate(
        {name: (lambda call=call: seconds(call) * per_layer) for name, call in candidates.items()},
        5 if quick else 15,
        "attention over a shared prefix",
    )
    case = f"{ROWS} rows x {LENGTH:,} tokens, {SHARED:,} of them shared"
    rows = [Row.of(case, "ms/layer", samples, targets={HAND: 0.5, CONCATENATED: 0.25})]
    text = [
        f"{HEADS} query and {KV_HEADS} K/V heads of {SIZE}, one new token per row, in turn through {LAYERS} layers of "
        "different K/V. Ours writes the new K/V, plans the step and attends; found from the block tables alone.",
    ]
    return Table("torch_attention", "PyTorch: decode attention of rows that share a prefix", text, rows)


def check(core: BlockCache, store: TensorStore, seqs: list, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """The result is that of plain attention over each row's own tokens."""
    plan = core.plan(seqs, [[1]] * len(seqs))
    found = layers_of(store, plan, q, k, v)
    for row, extents in enumerate(plan.groups[0].extents):
        slots = [slot for first, size, _ in extents for slot in range(first, first + size)]
        own_k, own_v = (store.read(LAYERS - 1, name, slots).transpose(0, 1)[None] for name in "kv")
        expected = F.scaled_dot_product_attention(q[row : row + 1], own_k, own_v, enable_gqa=True)
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-5, rtol=1e-4)
    core.rollback(plan)
