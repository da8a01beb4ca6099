"""``score`` and ``generate(speculate=, prefill_chunk=)`` in Keras: equal to the same without a cache."""

from __future__ import annotations

import numpy as np
import pytest

from kvcache_core.sampling import log_softmax
from kvcache_keras import KVCache, generate, score, stream
from tests.adapters.keras.models import Decoder
from tests.reference_decoder import DecoderConfig, make_weights, run_uncached

CONFIG = DecoderConfig(windows=(None, 7), dtype="float64")


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(CONFIG, make_weights(CONFIG))


@pytest.fixture(scope="module")
def attached(model):
    cache = KVCache(300, block_size=4)
    cache.attach(model, outputs="last")
    return cache


@pytest.fixture
def cache(attached):
    """Empty, with the graphs that were traced before."""
    attached.clear()
    return attached


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab, length).tolist()


def test_scores_equal_a_float64_recompute(model, cache):
    weights = make_weights(CONFIG)
    shots = text(0, 50)
    asked = [([*shots, *text(seed, 5)], text(seed + answer, 1 + answer)) for seed in (1, 2) for answer in range(4)]
    asked += [([3], text(9, 6)), (shots, text(8, 2))]
    plain = score(model, asked)
    for chunk in (1024, 5):
        for found in (score(model, asked, cache=cache, prefill_chunk=chunk), plain):
            for one, (start, continuation) in zip(found, asked, strict=True):
                logits = run_uncached(CONFIG, weights, [*start, *continuation], np.float64)[len(start) - 1 : -1]
                exact = log_softmax(logits)[np.arange(len(continuation)), continuation]
                np.testing.assert_allclose(one.token_log_likelihoods, exact, atol=1e-9)
                assert one.is_greedy == (logits.argmax(-1).tolist() == continuation)
        cache.clear()
    assert cache.stats().hit_tokens > 2 * 50
    assert set(cache.runner.traces.values()) == {1}
    cache.core.check_valid()


@pytest.mark.parametrize("chunk", [None, 5])
def test_chunks_drafts_and_streams_change_nothing(model, cache, chunk):
    prompts = [text(0, 7) * 4, text(1, 40), [3]]
    expected = generate(model, prompts, max_new_tokens=[12, 3, 9])
    found = generate(model, prompts, max_new_tokens=[12, 3, 9], cache=cache, prefill_chunk=chunk, speculate=6)
    assert found == expected
    assert [*stream(model, prompts[0], max_new_tokens=12, cache=cache, speculate=3)] == expected[0]
    sampled = {"max_new_tokens": 9, "temperature": 0.3, "seed": 1}
    assert generate(model, prompts, cache=cache, speculate=4, **sampled) == generate(model, prompts, **sampled)
    cache.clear()
    seq = cache.open(prompts[1])
    logits = cache.step([seq], [prompts[1][seq.num_cached :]], prefill_chunk=chunk)
    seq.close()
    exact = run_uncached(CONFIG, make_weights(CONFIG), prompts[1], np.float64)[-1]
    np.testing.assert_allclose(logits[0], exact, atol=1e-9)
