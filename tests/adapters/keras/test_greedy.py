"""Several greedy steps in one graph: the same tokens, sequences and stored state as step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache_core import CacheFull, InvalidInput
from kvcache_core.frontend import FrontendCache
from kvcache_core.layout import SCALED_DTYPES
from kvcache_keras import KVCache
from tests.adapters.keras.models import VOCAB, Decoder, Small, fill_with_nan, ids, tensor
from tests.reference_decoder import DecoderConfig, decoder_configs, make_weights

PROMPTS = st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=20), min_size=1, max_size=3)


def opened(cache: KVCache, prompts: Sequence[list[int]]) -> tuple[list, list[list[int]]]:
    """The prompts' sequences without each last token, and those tokens."""
    seqs = [cache.open(prompt) for prompt in prompts]
    for seq, prompt in zip(seqs, prompts, strict=True):
        rest = prompt[seq.num_cached : -1]
        if rest:
            cache.step([seq], [rest])
    return seqs, [prompt[-1:] for prompt in prompts]


def check(
    config: DecoderConfig, prompts: list[list[int]], counts: list[int], eos_ids: set[int], dtype, *, compiled=False
) -> None:
    model = Decoder(config, make_weights(config))
    cache = KVCache(size=200, block_size=config.block_size, dtype=dtype)
    cache.attach(model, outputs="last")
    fill_with_nan(cache.store)
    one_by_one, in_a_graph = opened(cache, prompts), opened(cache, prompts)
    for count in counts:
        expected = FrontendCache.decode_greedy(cache, *one_by_one, count, eos_ids)
        cache.runner.compiled = compiled
        chosen = cache.decode_greedy(*in_a_graph, count, eos_ids)
        np.testing.assert_array_equal(chosen, expected)
        assert chosen.dtype == np.int64
        cache.runner.compiled = False
        cache.core.check_valid()
        one_by_one, in_a_graph = ((seqs, chosen[:, -1:].tolist()) for seqs, _ in (one_by_one, in_a_graph))
        assert [seq.tokens for seq in in_a_graph[0]] == [seq.tokens for seq in one_by_one[0]]
    tolerance = 1e-9 if config.dtype == "float64" and dtype is None else 2e-5
    np.testing.assert_allclose(
        cache.step(*in_a_graph), cache.step(*one_by_one), rtol=tolerance, atol=tolerance if dtype is None else 2e-2
    )
    loop = "compiled loop" if compiled else "loop"
    assert {name: count for name, count in cache.runner.traces.items() if "loop" in name} == {loop: 1}


@settings(max_examples=4)
@given(
    decoder_configs(head_sizes=(4, 8, 16), max_layers=2),
    PROMPTS,
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.sets(st.integers(0, 10), max_size=1),
)
def test_equals_step_by_step(config, prompts, counts, eos_ids) -> None:
    check(config, prompts, counts, eos_ids, None)


@settings(max_examples=2)
@given(decoder_configs(head_sizes=(8,), max_layers=2, dtypes=("float32",)), PROMPTS)
def test_what_the_store_rounds_is_rounded(config, prompts) -> None:
    check(config, prompts, [5, 1], set(), "float16")


@settings(max_examples=2)
@given(decoder_configs(head_sizes=(8,), max_layers=2, dtypes=("float64",)), PROMPTS, st.sampled_from(SCALED_DTYPES))
def test_what_the_store_scales_is_scaled(config, prompts, dtype) -> None:
    check(config, prompts, [5, 1], set(), dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str) -> None:
    model = Small(dtype=dtype, layers=1)
    cache = KVCache(size=12, block_size=4)
    cache.attach(model, outputs="last")
    seq = cache.open([1, 2, 3])
    expected = FrontendCache.decode_greedy(cache, [seq.fork()], [[1, 2, 3]], 4)
    np.testing.assert_array_equal(cache.decode_greedy([seq], [[1, 2, 3]], 4), expected)


def small() -> KVCache:
    cache = KVCache(size=12, block_size=4)
    cache.attach(Small(), outputs="last")
    return cache


@pytest.fixture(scope="module")
def attached() -> KVCache:
    return small()


@pytest.fixture
def cache(attached: KVCache) -> Iterator[KVCache]:
    """Empty, with the graphs that were traced before."""
    yield attached
    for seq in list(attached.core._open.values()):
        seq.close()
    attached.clear()


def test_a_prompt_goes_first_and_an_end_stops_all_rows(cache: KVCache) -> None:
    prompts = [ids(6).tolist(), [3, 1]]
    seqs = [cache.open(prompt) for prompt in prompts]
    whole = FrontendCache.decode_greedy(cache, [seq.fork() for seq in seqs], prompts, 5)
    np.testing.assert_array_equal(cache.decode_greedy([seq.fork() for seq in seqs], prompts, 5), whole)
    end = int(whole[1, 2])
    first = next(at for at in range(5) if end in whole[:, at])
    np.testing.assert_array_equal(cache.decode_greedy(seqs, prompts, 5, [end, VOCAB + 1]), whole[:, : first + 1])
    assert [seq.length for seq in seqs] == [6 + first, 2 + first]
    cache.core.check_valid()


def test_without_room_there_are_fewer_tokens(cache: KVCache) -> None:
    prompt = ids(40).tolist()
    seq = cache.open(prompt)
    chosen = cache.decode_greedy([seq], [prompt], 30)
    assert chosen.shape == (1, 9)
    assert seq.length == 48
    with pytest.raises(CacheFull):
        cache.decode_greedy([seq], chosen[:, -1:].tolist(), 3)
    assert seq.length == 48
    cache.core.check_valid()


def test_a_prompt_that_leaves_no_room_has_its_token(cache: KVCache) -> None:
    prompt = ids(48).tolist()
    expected = cache.model(tensor([prompt]))[0, -1].numpy().argmax()
    seq = cache.open(prompt)
    np.testing.assert_array_equal(cache.decode_greedy([seq], [prompt], 5), [[expected]])
    assert seq.length == 48
    cache.core.check_valid()


@pytest.mark.parametrize("count", [0, -3])
def test_no_tokens_wanted_is_refused(cache: KVCache, count: int) -> None:
    seq = cache.open([1, 2, 3])
    for tokens in ([1, 2, 3], [1]):
        with pytest.raises(InvalidInput, match="at least 1"):
            cache.decode_greedy([seq], [tokens], count)
    assert seq.length == 0


def test_rows_that_share_more_than_the_pool_could_copy_are_stepped() -> None:
    cache = small()
    prompt = ids(24).tolist()
    seq = cache.open(prompt)
    last = cache.step_greedy([seq], [prompt])
    rows = [seq, seq.fork(), seq.fork()]
    chosen = cache.decode_greedy(rows, [last.tolist()] * 3, 4)
    assert chosen.tolist() == [chosen[0].tolist()] * 3
    assert "loop" not in cache.runner.traces
    cache.core.check_valid()


def test_an_exception_loses_nothing(cache: KVCache) -> None:
    seq = cache.open([1, 2, 3])
    [token] = cache.step_greedy([seq], [[1, 2, 3]])
    expected = cache.decode_greedy([seq.fork()], [[token]], 4)
    graph = cache.runner._functions["loop"]

    def failing(*arrays):
        graph(*arrays)
        raise RuntimeError("broken")

    cache.runner._functions["loop"] = failing
    with pytest.raises(RuntimeError, match="broken"):
        cache.decode_greedy([seq], [[token]], 4)
    cache.runner._functions["loop"] = graph
    cache.core.check_valid()
    assert seq.length == 3
    np.testing.assert_array_equal(cache.decode_greedy([seq], [[token]], 4), expected)
