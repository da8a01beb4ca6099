"""Several greedy steps at once: the same tokens, the same sequences as one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache_core import BlockCache, CacheFull, InvalidInput
from kvcache_core.frontend import FrontendCache

VOCAB = 7


class Chain:
    """A `FrontendCache` whose model is arithmetic: the next token depends on the last one and its position."""

    decode_greedy = FrontendCache.decode_greedy

    def __init__(self, num_blocks: int) -> None:
        self.core = BlockCache(num_blocks, block_size=4)
        self.steps = 0

    @staticmethod
    def after(token: int, position: int) -> int:
        return (3 * token + position + 1) % VOCAB

    def step_greedy(self, seqs, token_ids):
        self.steps += 1
        self.core.commit(self.core.plan(seqs, token_ids))
        return np.array([self.after(ids[-1], seq.length - 1) for seq, ids in zip(seqs, token_ids, strict=True)])


def expected(tokens: list[int], count: int) -> list[int]:
    new = [Chain.after(tokens[-1], len(tokens) - 1)]
    while len(new) < count:
        new.append(Chain.after(new[-1], len(tokens) + len(new) - 1))
    return new


PROMPTS = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), min_size=1, max_size=3)


@given(PROMPTS, st.integers(1, 12), st.sets(st.integers(0, VOCAB - 1), max_size=2))
def test_tokens_lengths_and_the_first_end(prompts, count, eos_ids):
    cache = Chain(64)
    seqs = [cache.core.open(tokens) for tokens in prompts]
    chosen = cache.decode_greedy(seqs, [t[s.num_cached :] for t, s in zip(prompts, seqs, strict=True)], count, eos_ids)
    rows = [expected(tokens, count) for tokens in prompts]
    ends = [step for step in range(count) if any(row[step] in eos_ids for row in rows)]
    number = min([*ends, count - 1]) + 1
    assert chosen.tolist() == [row[:number] for row in rows]
    assert [seq.tokens for seq in seqs] == [[*t, *row[: number - 1]] for t, row in zip(prompts, rows, strict=True)]


def test_without_room_for_all_steps_there_are_fewer_and_nothing_is_lost():
    cache = Chain(2)
    seq = cache.core.open([1, 2, 3])
    chosen = cache.decode_greedy([seq], [[1, 2, 3]], 20)
    assert chosen.tolist() == [expected([1, 2, 3], 6)]
    assert seq.length == 8
    with pytest.raises(CacheFull):
        cache.decode_greedy([seq], chosen[:, -1:].tolist(), 20)
    assert seq.length == 8


@pytest.mark.parametrize("count", [0, -3, 2.5, "2"])
def test_a_count_that_is_none_is_refused(count):
    cache = Chain(2)
    seq = cache.core.open([1, 2, 3])
    with pytest.raises(InvalidInput, match="at least 1"):
        cache.decode_greedy([seq], [[1, 2, 3]], count)
    assert seq.length == 0
