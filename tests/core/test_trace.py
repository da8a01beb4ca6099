"""A trace of conversations: the block cache finds and evicts exactly what a list in order of use does."""

from __future__ import annotations

from hypothesis import event, given
from hypothesis import strategies as st

from tests.naive_lru import NaiveLru, Replay, Request


@st.composite
def conversations(draw):
    """Requests whose prompts go on where an earlier one's stopped, or branch off inside it."""
    prompts: list[tuple[int, ...]] = []
    requests = []
    fresh = 0
    for base, cut, more, new in draw(
        st.lists(
            st.tuples(st.integers(0, 30), st.integers(0, 12), st.integers(0, 5), st.integers(1, 9)),
            min_size=1,
            max_size=40,
        )
    ):
        past = prompts[base % len(prompts)][:cut] if prompts else ()
        ids = (*past, *range(fresh, fresh + more)) or (fresh,)
        fresh += more + 1
        prompts.append(ids)
        requests.append(Request(ids, new))
    return requests


@given(conversations(), st.integers(4, 60), st.integers(1, 4))
def test_the_same_hits_and_evictions_as_a_naive_lru(requests, num_blocks, block_size):
    ours, naive = Replay(num_blocks, block_size), NaiveLru(num_blocks)
    for number, request in enumerate(requests):
        ours.serve(number, request, block_size)
        naive.serve(number, request, block_size)
        assert ours.hit_blocks == naive.hit_blocks
        assert ours.core.stats().evicted_blocks == naive.evicted
        assert ours.core.stats().cached_blocks == len(naive.cached)
    ours.core.check_valid()
    event("evicted" if naive.evicted else "all fitted")
    event("hits" if naive.hit_blocks else "no hits")
