"""Every decoder family of KerasHub in every mode: with the cache as without it."""

from __future__ import annotations

import functools
import warnings

import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache_core import KVCacheWarning
from kvcache_core.testing import assert_cached_equals_recompute
from kvcache_keras import KVCache
from kvcache_keras.hub import attach
from tests.adapters.keras_hub.families import CAUSAL, batch, build, own, run
from tests.supported import claimed, proven

pytestmark = pytest.mark.filterwarnings("ignore:You are using a softmax over axis")
TABLE = "Keras: KerasHub"
MODES = {"forward", "stepwise", "greedy", "sampling", "padding", "beam search", "small pool", "graph"}
SMOKE = ["Llama"]
each_family = pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.slow) for name in CAUSAL])
some_families = pytest.mark.parametrize(
    "family", [name if name in SMOKE else pytest.param(name, marks=pytest.mark.slow) for name in CAUSAL]
)


def test_the_table_claims_what_is_tested_here_and_no_more():
    assert claimed(TABLE) == {(family, mode) for family in CAUSAL for mode in MODES}


def attached(model, size=64):
    cache = KVCache(size=size, block_size=4)
    attach(model, cache)
    return cache


def check_idle(cache):
    cache.core.check_valid()
    stats = cache.stats()
    assert stats.open_sequences == 0 == stats.live_blocks
    assert stats.bypassed_calls == 0


def recompute(model, inputs):
    """Greedy tokens by running the whole model for each column."""
    tokens, mask = np.array(inputs["token_ids"]), np.array(inputs["padding_mask"])
    for column in range(mask.sum(1).min(), tokens.shape[1]):
        part = tf.constant(tokens[:, :column])
        logits = np.asarray(model({"token_ids": part, "padding_mask": tf.ones_like(part)}))[:, -1]
        tokens[:, column] = np.where(mask[:, column], tokens[:, column], logits.argmax(-1))
    return tokens


@pytest.mark.parametrize("family", CAUSAL)
def test_layers_are_known_and_pass_the_check_in_parts(family):
    model = build(family)
    cache = attached(model)
    layers = cache.store.layout.layers  # made behind the check: whole and in three parts, the same numbers
    assert len(layers) == model.backbone.num_layers
    windows = {layer.window for layer in layers}
    assert windows == {
        "Mistral": {6},
        "Mixtral": {6},
        "Gemma 2": {None, 6},
        "Gemma 3": {None, 6},
        "Qwen3": {32768},
    }.get(family, {None})
    cache.detach()


@some_families
def test_greedy_over_ragged_rows(family):
    model, inputs = build(family), batch(width=12)
    expected, library = recompute(model, inputs), own(model, inputs)[0]
    cache = attached(model)
    first, second = run(model, inputs)[0], run(model, inputs)[0]
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(second, expected)
    assert cache.stats().hit_tokens >= 8 + 6 + 4  # the second call computes no prompt but for last tokens
    check_idle(cache)
    cache.detach()
    np.testing.assert_array_equal(own(model, inputs)[0], library)
    if family != "GPT-NeoX":  # its own decoding turns every query as if it stood at position 0
        np.testing.assert_array_equal(library, expected)
    proven(TABLE, family, "greedy")
    proven(TABLE, family, "padding")


@each_family
def test_forward_and_stepwise(family):
    model, cache = build(family), KVCache(size=96, block_size=4)
    cache.attach(model)
    report = assert_cached_equals_recompute(model, cache, max_length=20, max_new_tokens=4, rounds=2)
    assert report.reused_tokens > 0
    check_idle(cache)
    proven(TABLE, family, "forward")
    proven(TABLE, family, "stepwise")


@each_family
def test_in_a_graph(family):
    model, cache = build(family), KVCache(size=96, block_size=4)
    inputs = batch((9, 7), width=9)
    given = np.asarray(inputs["padding_mask"])
    expected = np.asarray(model(inputs))
    cache.attach(model)
    with cache:
        graph = tf.function(lambda ids, mask: model({"token_ids": ids, "padding_mask": mask}))
        for _ in range(2):
            found = np.asarray(graph(inputs["token_ids"], inputs["padding_mask"]))
            allowed = 64 * np.finfo(np.float32).eps * np.abs(expected).max()
            np.testing.assert_allclose(found[given], expected[given], rtol=0, atol=allowed)
            assert not found[~given].any()
    assert cache.stats().hit_tokens >= 8 + 6
    check_idle(cache)
    proven(TABLE, family, "graph")


@each_family
def test_sampling_and_beam_search(family):
    model, inputs = build(family), batch((6, 4), width=9)
    if family in ("GPT-NeoX", "Gemma 3"):
        inputs = batch((6, 6), width=9)
    cache = attached(model)
    for sampler, mode in (
        (lambda: keras_hub.samplers.TopKSampler(k=4, seed=3), "sampling"),
        (lambda: keras_hub.samplers.TopPSampler(p=0.9, seed=3), "sampling"),
        (lambda: keras_hub.samplers.BeamSampler(num_beams=3), "beam search"),
    ):
        model.compile(sampler=sampler(), run_eagerly=True)
        found = run(model, inputs)
        model.compile(sampler=sampler(), run_eagerly=True)
        # GPT-NeoX: see above. Gemma 3: its own beam search ends with an error for more rows than it was given.
        by_itself = family not in ("GPT-NeoX", "Gemma 3")
        np.testing.assert_array_equal(found[0], own(model, inputs)[0] if by_itself else uncached(model, inputs))
        proven(TABLE, family, mode)
    check_idle(cache)


def uncached(model, inputs):
    """The model's sampler over the whole model, computed anew for every column."""
    mask = inputs["padding_mask"]

    def following(prompt, cache, index):
        part = prompt[:, : int(index)]
        return model({"token_ids": part, "padding_mask": tf.ones_like(part)})[:, -1], None, ()

    first = int(np.asarray(mask).sum(1).min())
    return np.asarray(model.sampler(following, inputs["token_ids"], cache=(), index=first, mask=mask))


@each_family
def test_a_small_pool_evicts_and_stays_right(family):
    model = build(family)
    expected = {seed: recompute(model, batch(seed=seed)) for seed in range(2)}
    cache = attached(model, size=14)
    for seed in (0, 1, 0):
        np.testing.assert_array_equal(run(model, batch(seed=seed))[0], expected[seed])
    assert cache.stats().evicted_blocks > 0
    check_idle(cache)
    proven(TABLE, family, "small pool")


ROW = st.lists(st.integers(1, 3), min_size=1, max_size=9)
REQUEST = st.tuples(st.lists(ROW, min_size=1, max_size=3), st.integers(1, 4), st.sampled_from(["greedy", "beam"]))


@functools.cache
def llama():
    return build("Llama")


@pytest.mark.slow
@settings(max_examples=12)
@given(st.lists(REQUEST, min_size=2, max_size=5), st.sampled_from([8, 13, 64]))
def test_any_requests_over_any_pool(requests, size):
    """Few ids, so that prompts share prefixes; pools that evict, and pools that are too small."""
    model = llama()
    cache = attached(model, size)
    try:
        for rows, new, sampler in requests:
            width = max(map(len, rows)) + new
            ids = np.array([row + [0] * (width - len(row)) for row in rows])
            inputs = {"token_ids": tf.constant(ids, tf.int32), "padding_mask": tf.constant(ids > 0)}
            model.compile(sampler=sampler, run_eagerly=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", KVCacheWarning)  # no room: the library computes it
                found = run(model, inputs)[0]
            np.testing.assert_array_equal(found, own(model, inputs)[0])
            cache.core.check_valid()
            assert cache.stats().live_blocks == 0
    finally:
        cache.detach()
