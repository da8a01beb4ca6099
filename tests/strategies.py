"""Hypothesis strategies and helpers for the core: token lists that share heads, layouts, and whole-state snapshots."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from kvcache_core import BlockCache, BlockLayout, LayerSpec, Sequence

__all__ = ["common_head", "compute", "layouts", "prompts", "snapshot", "step"]


def prompts(*, vocab: int = 3, max_size: int = 14) -> st.SearchStrategy[list[int]]:
    """Prompts of few different tokens, so that two of them often share a head."""
    return st.lists(st.integers(0, vocab - 1), min_size=1, max_size=max_size)


def layouts(*, outputs: bool = True) -> st.SearchStrategy[BlockLayout]:
    """Layouts with full, window, mixed and stored-output layers."""
    windows = st.lists(st.one_of(st.none(), st.integers(1, 9)), min_size=1, max_size=3)

    def build(layer_windows: list[int | None], block_size: int, with_outputs: bool) -> BlockLayout:
        layers = [LayerSpec.attention(1, 2, window=window) for window in layer_windows]
        return BlockLayout(layers + [LayerSpec.output(3)] * (outputs and with_outputs), block_size)

    return st.builds(build, windows, st.integers(1, 5), st.booleans())


def step(core: BlockCache, seq: Sequence, tokens: list[int]) -> None:
    """One whole step over one row."""
    core.commit(core.plan([seq], [tokens]))


def compute(core: BlockCache, tokens: list[int], salt: bytes = b"", **options: Any) -> Sequence:
    """Open a prompt and compute what is not cached."""
    seq = core.open(tokens, salt, **options)
    step(core, seq, tokens[seq.num_cached :])
    return seq


def common_head(left: Any, right: Any) -> int:
    """How many leading items two sequences share."""
    count = 0
    for mine, theirs in zip(left, right, strict=False):
        if mine != theirs:
            break
        count += 1
    return count


def snapshot(core: BlockCache) -> dict[str, Any]:
    """All that a cache holds, to compare before and after a call that must change nothing."""
    index = core._index
    nodes = {
        node: (
            index.parent(node),
            index.tokens(node).tolist(),
            dict(index.extras(node)),
            index.is_open(node),
            index._uses[node],
        )
        for node in index.alive()
    }
    pools = [
        {
            "blocks": [(pool.refs(b), pool.is_findable(b)) for b in range(1, pool.num_blocks + 1)],
            "counts": (pool.num_free, pool.num_cached, pool.num_live),
            "lru": pool.lru_order(),
            "attached": [index.node(number, b) for b in range(1, pool.num_blocks + 1)],
        }
        for number, pool in enumerate(group.pool for group in core.groups)
    ]
    sequences = {
        seq.id: (
            (seq.length, seq.num_cached, seq.in_step, seq.max_length, seq.cut_tail),
            list(seq.nodes),
            [list(table) for table in seq.tables],
            list(seq.dropped),
        )
        for seq in core._open.values()
    }
    return {"nodes": nodes, "pools": pools, "sequences": sequences, "stats": core.stats()}
