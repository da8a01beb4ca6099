"""generate and stream: cached equals recompute, and every graph is traced once."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from kvcache_core import CacheFull, InvalidInput, UsageError
from kvcache_keras import KVCache, generate, stream
from kvcache_keras.recompute import recompute_of
from tests.adapters.keras.models import Small, functional, ids, sequential

PROMPTS = [[1, 2, 3], ids(17).tolist(), [7], [*ids(17).tolist()[:11], 4, 4]]


@pytest.fixture(scope="module")
def model() -> Small:
    return Small()


@pytest.fixture(scope="module")
def attached(model: Small) -> KVCache:
    cache = KVCache(size=128, block_size=4)
    cache.attach(model, outputs="last")
    return cache


@pytest.fixture
def cache(attached: KVCache) -> KVCache:
    """Empty, with the graphs that were traced before."""
    attached.clear()
    return attached


def test_greedy_equals_recompute(model: Small, cache: KVCache) -> None:
    plain = generate(model, PROMPTS, max_new_tokens=12)
    assert generate(model, PROMPTS, max_new_tokens=12, cache=cache) == plain
    before = cache.stats().hit_tokens
    assert generate(model, PROMPTS, max_new_tokens=12, cache=cache) == plain
    assert cache.stats().hit_tokens > before
    assert [len(row) for row in plain] == [12] * 4
    cache.core.check_valid()
    assert cache.stats().open_sequences == 0


def test_inside_with_the_active_cache_is_used(model: Small, cache: KVCache) -> None:
    plain = generate(model, PROMPTS[:1], max_new_tokens=3)
    before = cache.stats().miss_tokens
    with cache:
        assert generate(model, PROMPTS[:1], max_new_tokens=3) == plain
    assert cache.stats().miss_tokens > before


def test_sampling_is_repeatable_and_does_not_depend_on_the_batch(model: Small, cache: KVCache) -> None:
    options = {"max_new_tokens": 8, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    first = generate(model, PROMPTS, cache=cache, seed=3, **options)
    assert generate(model, PROMPTS, cache=cache, seed=3, **options) == first
    assert generate(model, PROMPTS, seed=3, **options) == first
    assert generate(model, PROMPTS[:1], cache=cache, seed=3, **options) == first[:1]
    assert generate(model, PROMPTS, cache=cache, seed=4, **options) != first


def test_n_and_beams_equal_recompute(model: Small, cache: KVCache) -> None:
    for options in ({"n": 3, "temperature": 1.0, "seed": 1}, {"num_beams": 4, "n": 2, "eos_id": 3}):
        found = generate(model, PROMPTS[:2], max_new_tokens=6, cache=cache, **options)
        assert found == generate(model, PROMPTS[:2], max_new_tokens=6, **options)
        assert len(found) == 2 * options["n"]
    cache.core.check_valid()
    assert cache.stats().open_sequences == 0


def test_stream_gives_the_same_tokens_one_by_one(model: Small, cache: KVCache) -> None:
    [expected] = generate(model, PROMPTS[1:2], max_new_tokens=6, cache=cache)
    assert list(stream(model, PROMPTS[1], max_new_tokens=6, cache=cache)) == expected
    assert list(stream(model, PROMPTS[1], max_new_tokens=6)) == expected
    started = stream(model, PROMPTS[1], max_new_tokens=6, cache=cache)
    assert next(started) == expected[0]
    started.close()
    assert cache.stats().open_sequences == 0
    stop = list(stream(model, PROMPTS[1], max_new_tokens=6, cache=cache, eos_id=expected[2]))
    assert stop == expected[: expected.index(expected[2]) + 1]


@pytest.mark.parametrize("make", [functional, sequential])
def test_functional_and_sequential_models(make) -> None:
    model = make()
    assert generate(model, PROMPTS, max_new_tokens=5, cache=KVCache(size=64, block_size=4)) == generate(
        model, PROMPTS, max_new_tokens=5
    )


def test_one_trace_whatever_lengths_and_batch_sizes() -> None:
    model = Small()
    cache = KVCache(size=256, block_size=4)
    for number in range(10):
        prompts = ids(1 + number % 4, 3 + 4 * number, seed=number).tolist()
        generate(model, prompts, max_new_tokens=3, cache=cache)
        generate(model, prompts, max_new_tokens=1)
    cache.resize(300)
    generate(model, ids(2, 60, seed=99).tolist(), max_new_tokens=2, cache=cache)
    assert cache.runner.traces == {"prefill": 1, "loop": 1}
    assert recompute_of(model).traces == 1


def test_a_model_that_is_not_built_yet() -> None:
    assert len(generate(Small(), [[1, 2]], max_new_tokens=3)[0]) == 3


def test_bad_input_and_nothing_lost() -> None:
    model = Small()
    cache = KVCache(size=8, block_size=4)
    cache.attach(model, outputs="last")
    for prompts, error in (
        ([[]], InvalidInput),
        ([[1, -1]], InvalidInput),
        ([[1, 50]], InvalidInput),
        ([[1, 2.5]], InvalidInput),
        ([list(range(40))], CacheFull),
    ):
        with pytest.raises(error):
            generate(model, prompts, max_new_tokens=2, cache=cache)
        cache.core.check_valid()
        assert cache.stats().live_blocks == 0
    with pytest.raises(CacheFull) as full:
        generate(model, [list(range(40))], max_new_tokens=2, cache=cache)
    assert full.value.needed > full.value.capacity == 8
    with pytest.raises(UsageError, match="another model"):
        generate(Small(), [[1]], max_new_tokens=1, cache=cache)


def test_an_exception_in_the_model_loses_nothing(cache: KVCache) -> None:
    seq = cache.open([1, 2, 3])
    cache.step([seq], [[1, 2, 3]])
    other = seq.fork()
    expected = cache.step([other], [[4]])
    decode = cache.runner._functions["decode"]

    def failing(*arrays: tf.Tensor) -> tf.Tensor:
        decode(*[arrays[0] * 0 + 9, *arrays[1:]])  # another token's K and V are written before it fails
        raise RuntimeError("broken")

    cache.runner._functions["decode"] = failing
    with pytest.raises(RuntimeError, match="broken"):
        cache.step([seq], [[4]])
    cache.runner._functions["decode"] = decode
    cache.core.check_valid()
    assert seq.length == 3
    assert np.array_equal(cache.step([seq], [[4]]), expected)
    for each in (seq, other):
        each.close()
