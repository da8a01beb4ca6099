"""``causal_lm.generate`` from a cache: what KerasHub's own gives, and what recomputing everything gives."""

from __future__ import annotations

import keras_hub
import numpy as np
import pytest
import tensorflow as tf

from kvcache_core import InvalidType, KVCacheWarning
from kvcache_keras import KVCache
from kvcache_keras.hub import attach
from tests.adapters.keras_hub.families import CAUSAL, VOCAB, build

pytestmark = pytest.mark.filterwarnings("ignore:You are using a softmax over axis")
SMOKE = ["Llama", "Gemma 2", "GPT-2", "BLOOM"]
FAMILIES = [family if family in SMOKE else pytest.param(family, marks=pytest.mark.slow) for family in CAUSAL]


def batch(lengths=(9, 7, 5), width=15, seed=1):
    """Ragged prompts [B, L] padded on the right; the second shares 4 tokens with the first."""
    ids = np.random.default_rng(seed).integers(1, VOCAB, (len(lengths), width))
    if len(lengths) > 1:
        ids[1, :4] = ids[0, :4]
    mask = np.arange(width) < np.array(lengths)[:, None]
    return {"token_ids": tf.constant(np.where(mask, ids, 0), tf.int32), "padding_mask": tf.constant(mask)}


def run(model, inputs, stop=None):
    """The model's generation without its text processing: tokens and mask as numpy."""
    result = model.make_generate_function()(dict(inputs), stop_token_ids=stop)
    return np.asarray(result["token_ids"]), np.asarray(result["padding_mask"])


def recompute(model, inputs):
    """Greedy tokens by running the whole model for each column."""
    tokens, mask = np.array(inputs["token_ids"]), np.array(inputs["padding_mask"])
    for column in range(mask.sum(1).min(), tokens.shape[1]):
        ones = np.ones_like(tokens[:, :column])
        logits = np.asarray(model({"token_ids": tokens[:, :column], "padding_mask": ones}))[:, -1]
        tokens[:, column] = np.where(mask[:, column], tokens[:, column], logits.argmax(-1))
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_the_library_and_a_full_recompute(family):
    model, inputs = build(family), batch()
    expected, library = recompute(model, inputs), run(model, inputs)[0]
    cache = KVCache(size=64, block_size=4)
    attach(model, cache)
    first, second = run(model, inputs)[0], run(model, inputs)[0]
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(second, expected)
    assert cache.stats().hit_tokens >= 8 + 6 + 4  # the second call computes no prompt but for last tokens
    cache.detach()
    np.testing.assert_array_equal(run(model, inputs)[0], library)
    if family != "GPT-NeoX":  # its own decoding turns every query as if it stood at position 0
        np.testing.assert_array_equal(library, expected)


@pytest.fixture(scope="module")
def llama():
    return build("Llama")


@pytest.fixture
def cache(llama):
    cache = KVCache(size=64, block_size=4)
    attach(llama, cache)
    yield cache
    cache.detach()
    llama.compile(sampler="greedy", run_eagerly=True)


def own(llama, inputs, stop=None):
    """KerasHub's own generation of the attached model."""
    result = type(llama).make_generate_function(llama)(dict(inputs), stop_token_ids=stop)
    llama.generate_function = None
    return np.asarray(result["token_ids"]), np.asarray(result["padding_mask"])


@pytest.mark.parametrize(
    "sampler",
    [
        lambda: keras_hub.samplers.TopKSampler(k=5, seed=3),
        lambda: keras_hub.samplers.TopPSampler(p=0.8, seed=3, temperature=1.5),
        lambda: keras_hub.samplers.RandomSampler(seed=3),
        lambda: keras_hub.samplers.BeamSampler(num_beams=3),
    ],
)
def test_samplers_choose_what_the_library_chooses(llama, cache, sampler):
    inputs = batch((6, 4, 6), width=13)
    llama.compile(sampler=sampler(), run_eagerly=True)
    expected = own(llama, inputs)
    llama.compile(sampler=sampler(), run_eagerly=True)
    found = run(llama, inputs)
    np.testing.assert_array_equal(found, expected)
    assert cache.stats().live_blocks == 0
    assert cache.stats().bypassed_calls == 0


@pytest.mark.parametrize("sampler", ["greedy", "beam"])
def test_stop_tokens_end_where_the_library_ends(llama, cache, sampler):
    inputs = batch()
    llama.compile(sampler=sampler, run_eagerly=True)
    free, _ = own(llama, inputs)
    stop = [int(free[0, 10]), int(free[1, 12]), int(free[2, 9])]
    expected = own(llama, inputs, stop)
    found = run(llama, inputs, stop)
    np.testing.assert_array_equal(found, expected)
    assert not expected[1].all()


def test_contrastive_search_is_left_as_it_was(llama, cache):
    contrastive = getattr(keras_hub.samplers, "ContrastiveSampler", None)
    if contrastive is None:
        pytest.skip("this KerasHub has no contrastive sampler")
    llama.compile(sampler=contrastive(k=2), run_eagerly=True)
    inputs = batch((4,), width=6)
    np.testing.assert_array_equal(run(llama, inputs), own(llama, inputs))
    assert cache.stats().miss_tokens == 0


def test_a_request_that_does_not_fit_is_computed_by_the_library(llama):
    cache = KVCache(size=3, block_size=4)
    attach(llama, cache)
    try:
        with pytest.warns(KVCacheWarning, match="no room"):
            found = run(llama, batch())
        np.testing.assert_array_equal(found, own(llama, batch()))
        assert cache.stats().bypassed_calls == 1
    finally:
        cache.detach()


def test_a_small_pool_evicts_and_stays_right(llama):
    expected = {seed: own(llama, batch(seed=seed))[0] for seed in range(4)}
    cache = KVCache(size=14, block_size=4)
    attach(llama, cache)
    try:
        for seed in (0, 1, 2, 3, 1, 0):
            np.testing.assert_array_equal(run(llama, batch(seed=seed))[0], expected[seed])
        assert cache.stats().evicted_blocks > 0
    finally:
        cache.detach()


def test_new_prompt_lengths_cost_no_trace(llama, cache):
    for width in (6, 9, 12):
        run(llama, batch((3, 2), width=width))
    assert set(cache.runner.traces.values()) == {1}


def test_detach_gives_back_the_model_that_was_attached(llama):
    def own_attributes(layer):
        return {name: id(value) for name, value in vars(layer).items()}

    layers = list(llama._flatten_layers())
    before = [own_attributes(layer) for layer in layers]
    cache = KVCache(size=8)
    attach(llama, cache)
    assert [own_attributes(layer) for layer in layers] != before
    cache.detach()
    assert [own_attributes(layer) for layer in layers] == before


def test_only_causal_language_models_are_taken():
    with pytest.raises(InvalidType, match="CausalLM"):
        attach(object(), KVCache(size=4))
