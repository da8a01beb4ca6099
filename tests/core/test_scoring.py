"""Scores over the numpy cache equal a full recompute, and shared prefixes are computed once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache_core import CacheFull, InvalidInput, InvalidType
from kvcache_core.sampling import log_softmax
from kvcache_core.scoring import score_pairs
from tests.numpy_cache import decoders
from tests.reference_decoder import DecoderConfig, InjectedFault, decoder_configs, run_uncached

CONFIG = DecoderConfig(dtype="float64", windows=(None, 6), width=8)
IDS = st.lists(st.integers(0, 10), min_size=1, max_size=8)


@st.composite
def pairs(draw):
    base = draw(st.lists(st.integers(0, 10), min_size=1, max_size=40))
    prompts = st.tuples(st.integers(0, 40), st.lists(st.integers(0, 10), max_size=3))
    prompt = prompts.map(lambda cut: (base[: cut[0]] + cut[1]) or [1])
    return draw(st.lists(st.tuples(prompt, IDS), max_size=8))


def exact(model, prompt, continuation):
    """By definition, in float64."""
    logits = run_uncached(model.config, model.weights, [*prompt, *continuation], np.float64)[len(prompt) - 1 : -1]
    return log_softmax(logits)[np.arange(len(continuation)), continuation], logits.argmax(-1)


@given(
    config=decoder_configs(max_layers=2, head_sizes=[4]),
    pairs=pairs(),
    num_blocks=st.sampled_from([60, 400]),
    chunk=st.sampled_from([None, 1, 7, 64]),
)
@settings(max_examples=50)
def test_equals_the_definition(config, pairs, num_blocks, chunk):
    cached, plain = decoders(config, num_blocks)
    for decoder in (cached, cached, plain):
        found = score_pairs(decoder, pairs, chunk)
        assert len(found) == len(pairs)
        for score, (prompt, continuation) in zip(found, pairs, strict=True):
            scores, greedy = exact(cached.cache.model, prompt, continuation)
            bound = 1e-9 if config.dtype == "float64" else 1e-3
            np.testing.assert_allclose(score.token_log_likelihoods, scores, atol=bound)
            assert score.log_likelihood == pytest.approx(scores.sum(), abs=bound * len(continuation))
            if config.dtype == "float64":
                assert score.greedy_tokens.tolist() == greedy.tolist()
                assert score.is_greedy == (greedy.tolist() == continuation)
    cached.cache.check_at_rest()


def test_shared_prefixes_once_and_continuations_together():
    cached, _ = decoders(CONFIG, 400)
    rng = np.random.default_rng(0)
    shots = rng.integers(0, 11, 64).tolist()
    questions = [[*shots, *rng.integers(0, 11, 9).tolist()] for _ in range(6)]
    answers = rng.integers(0, 11, (6, 4, 3)).tolist()
    asked = [(question, answer) for question, row in zip(questions, answers, strict=True) for answer in row]
    score_pairs(cached, asked)
    # The shots with the first question; the other questions' own tokens; all answers. Last tokens come with answers.
    assert cached.cache.steps == [(1, 72), (5, 8), (24, 3)]


def test_one_prompt_with_many_continuations():
    cached, plain = decoders(CONFIG, 200)
    asked = [([1, 2, 3, 4, 5], [a, b]) for a in range(8) for b in range(8)]
    for one, other in zip(score_pairs(cached, asked), score_pairs(plain, asked), strict=True):
        np.testing.assert_allclose(one.token_log_likelihoods, other.token_log_likelihoods)
    total = sum(np.exp(score.log_likelihood) for score in score_pairs(cached, [([1, 2], [a]) for a in range(11)]))
    assert total == pytest.approx(1.0), "the probabilities of all tokens add up"


def test_logits_are_never_wide():
    cached, _ = decoders(DecoderConfig(dtype="float64", width=8, max_positions=2000), 400)
    long = np.random.default_rng(0).integers(0, 11, 700).tolist()
    score_pairs(cached, [([1], long), ([2], long[:600])], 128)
    assert max(rows * count for rows, count in cached.cache.steps) <= 256


@pytest.mark.parametrize(
    ("pair", "error", "message"),
    [
        (([1], []), InvalidInput, "continuation of pair 1 is empty"),
        (([], [1]), InvalidInput, "prompt of pair 1 is empty"),
        (([1], [99]), InvalidInput, "must be 0 .. 10"),
        (([99], [1]), InvalidInput, "must be 0 .. 10"),
        ((["a"], [1]), InvalidType, "prompt 1"),
        (([1], [1], [1]), InvalidInput, "pair 1 must be"),
        (5, InvalidInput, "pair 1 must be"),
        (([1] * 500, [1]), CacheFull, "501|500"),
    ],
)
def test_bad_pairs_before_anything_is_computed(pair, error, message):
    cached, _ = decoders(CONFIG, 50)
    with pytest.raises(error, match=message):
        score_pairs(cached, [([1, 2], [3]), pair])
    assert not cached.cache.steps


def test_an_error_closes_everything():
    for number in range(3):
        cached, _ = decoders(CONFIG, 200)
        cached.cache.fail_at = number
        with pytest.raises(InjectedFault):
            score_pairs(cached, [([1] * 40, [2, 3]), ([1] * 40, [4]), ([2] * 9, [5])], 32)
        cached.cache.check_at_rest()
