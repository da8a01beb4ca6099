"""``score`` and ``generate(speculate=, prefill_chunk=)`` in PyTorch: equal to the same without a cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache_core.sampling import log_softmax
from kvcache_core.testing_bound import Errors, over_draws
from kvcache_torch import KVCache, generate, score, stream
from kvcache_torch.recompute import most_likely
from tests.adapters.torch.models import RandomDecoder, Small, prompt
from tests.reference_decoder import decoder_configs, make_weights, run_uncached

PAIRS = st.lists(
    st.tuples(
        st.tuples(st.integers(1, 30), st.lists(st.integers(0, 10), max_size=2)),
        st.lists(st.integers(0, 10), min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=6,
)


@given(config=decoder_configs(max_layers=2), seed=st.integers(0, 99), pairs=PAIRS, chunk=st.sampled_from([None, 5]))
@settings(max_examples=25)
def test_scores_equal_a_float64_recompute(config, seed, pairs, chunk):
    """The error against float64 is at most 1.5 times that of the uncached run, plus 4 ulp of the largest logit: of this
    draw, or else of the mean of this one and a dozen more (one draw's error may be near zero by chance).
    """
    weights = make_weights(config)
    model = RandomDecoder(config, weights).eval()
    cache = KVCache(400, block_size=config.block_size)
    cache.attach(model, outputs="last")

    def draw(number: int) -> Errors:
        base = np.random.default_rng([seed, number]).integers(0, config.vocab, 30).tolist()
        asked = [(base[:cut] + tail, continuation) for (cut, tail), continuation in pairs]
        cached = score(model, asked, cache=cache, prefill_chunk=chunk)
        errors, largest = [0.0, 0.0], 0.0
        for (start, continuation), *found in zip(asked, cached, score(model, asked), strict=True):
            logits = run_uncached(config, weights, [*start, *continuation], np.float64)[len(start) - 1 : -1]
            largest = max(largest, float(np.abs(logits).max()))
            exact = log_softmax(logits)[np.arange(len(continuation)), continuation]
            error = [float(np.abs(one.token_log_likelihoods - exact).max()) for one in found]
            errors = list(map(max, errors, error))
        return Errors(*errors, slack=4 * float(np.spacing(np.array(largest, config.dtype))))

    errors, _ = over_draws(draw(0), draw)
    assert errors.holds, errors
    cache.core.check_valid()
    assert cache.stats().open_sequences == 0


def test_score_reuses_what_is_cached_and_reads_half_precision():
    model = Small().bfloat16()
    cache = KVCache(200, block_size=4)
    start = prompt(0, 60)
    asked = [(start, prompt(seed, 3)) for seed in range(5)]
    first = score(model, asked, cache=cache)
    computed = cache.stats().miss_tokens
    second = score(model, asked, cache=cache)
    assert cache.stats().miss_tokens - computed == 1  # the last token of a prompt is never taken from the cache
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(one.token_log_likelihoods, other.token_log_likelihoods, atol=0.1)
    with cache:
        assert len(score(model, asked)) == 5


@pytest.mark.parametrize("chunk", [None, 1, 5, 16])
def test_chunks_drafts_and_streams_change_nothing(chunk):
    model = Small().double()
    cache = KVCache(400, block_size=4)
    prompts = [prompt(0, 7) * 4, prompt(1, 40), [3]]
    expected = generate(model, prompts, max_new_tokens=[12, 3, 9])
    found = generate(model, prompts, max_new_tokens=[12, 3, 9], cache=cache, prefill_chunk=chunk, speculate=6)
    assert found == expected
    assert [*stream(model, prompts[0], max_new_tokens=12, cache=cache, speculate=3)] == expected[0]
    cache.clear()
    with torch.inference_mode():
        seq = cache.open(prompts[1])
        logits = cache.step([seq], [prompts[1][seq.num_cached :]], prefill_chunk=chunk)
        seq.close()
        np.testing.assert_allclose(logits[0], model(torch.tensor(prompts[1:2]))[0, -1].numpy(), atol=1e-10)


def test_sampling_with_drafts_draws_the_same_tokens():
    model = Small().double()
    cache = KVCache(400, block_size=4)
    prompts = [prompt(0, 6) * 5, prompt(1, 20)]
    for seed in range(3):
        options = {"max_new_tokens": 15, "temperature": 0.3, "top_k": 5, "seed": seed}
        assert generate(model, prompts, cache=cache, speculate=5, **options) == generate(model, prompts, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_of_equal_logits_the_first_is_chosen(dtype):
    rows = [[1, 3, 3], [2, 0, 2]], [[0, 0, 0], [-1, np.nan, 7]]
    chosen = most_likely(torch.tensor(rows, dtype=dtype))
    assert chosen.dtype == np.int64
    assert chosen.tolist() == [[1, 0], [0, 1]]  # what is not a number is the largest
