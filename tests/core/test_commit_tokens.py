"""A step whose tokens are known only when it has run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache_core import BlockCache, InvalidInput

ROWS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 8)), min_size=1, max_size=3)


@given(ROWS, st.integers(1, 5))
def test_the_sequence_has_the_tokens_that_were_committed(rows, block_size) -> None:
    core = BlockCache(num_blocks=200, block_size=block_size)
    prompts = [[number, *range(length)] for number, (length, _, _) in enumerate(rows)]
    seqs = [core.open(prompt) for prompt in prompts]
    core.commit(core.plan(seqs, [p[s.num_cached :] for p, s in zip(prompts, seqs, strict=True)]))
    new = [list(range(30, 30 + count)) for _, count, _ in rows]
    plan = core.plan(seqs, [[0] * (count + spare) for _, count, spare in rows])
    core.commit(plan, new)
    core.check_valid()
    whole = [prompt + tokens for prompt, tokens in zip(prompts, new, strict=True)]
    assert [seq.tokens for seq in seqs] == whole
    core.commit(core.plan(seqs, [[40]] * len(seqs)))
    assert [seq.tokens for seq in seqs] == [[*tokens, 40] for tokens in whole]
    for seq in seqs:
        seq.close()
    core.check_valid()
    assert all(core.cached_length([*tokens, 40, 1]) == len(tokens) + 1 for tokens in whole)


@pytest.mark.parametrize("tokens", [[[1, 2, 3]], [[]], [], [[1], [2]], [[-1]]])
def test_other_tokens_than_planned_are_refused(tokens) -> None:
    core = BlockCache(num_blocks=8, block_size=4)
    seq = core.open([1])
    plan = core.plan([seq], [[1, 0]])
    with pytest.raises(InvalidInput):
        core.commit(plan, tokens)
    core.commit(plan, [[1]])
    assert seq.tokens == [1]
