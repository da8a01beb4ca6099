"""Layers whose result for a sample depends on the others of its batch are never served; all others are."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops

from kvcache_core import KVCacheWarning
from kvcache_keras import KVCache

TOKENS, WIDTH = 5, 8
HOW = pytest.mark.parametrize("how", ["eager", "graph"])


class Function(layers.Layer):
    """A function of [B, T, D] as a layer."""

    def __init__(self, function, **options):
        super().__init__(**options)
        self.function = function

    def call(self, x):
        return self.function(x)


class SelfAttention(layers.Layer):
    """Attention over time or, by the axis, over samples."""

    def __init__(self, axis, **options):
        super().__init__(**options)
        self.attention = layers.MultiHeadAttention(2, 4)
        self.swap = axis == 0

    def call(self, x):
        x = ops.swapaxes(x, 0, 1) if self.swap else x
        y = self.attention(x, x)
        return ops.swapaxes(y, 0, 1) if self.swap else y


OWN = {
    "dense": lambda: layers.Dense(WIDTH),
    "norm": layers.LayerNormalization,
    "batch norm": layers.BatchNormalization,
    "convolution": lambda: layers.Conv1D(WIDTH, 3, padding="same"),
    "tanh": lambda: layers.Activation("tanh"),
    "softmax": lambda: layers.Activation("softmax"),
    "flip": lambda: Function(lambda x: ops.flip(x, 1)),
    "gru": lambda: layers.GRU(WIDTH, return_sequences=True),
    "attention": lambda: SelfAttention(1),
}

MIXING = {
    "mean": lambda: Function(lambda x: x - ops.mean(x, 0)),
    "largest": lambda: Function(lambda x: x - ops.take(x, ops.argmax(ops.max(ops.abs(x), (1, 2))), 0)),
    "first": lambda: Function(lambda x: x - x[:1]),
    "softmax": lambda: Function(lambda x: ops.softmax(x, 0)),
    "sum over samples": lambda: Function(lambda x: ops.cumsum(x, 0)),
    "the one before": lambda: Function(lambda x: x + ops.roll(x, 1, 0)),
    "flip": lambda: Function(lambda x: ops.flip(x, 0)),
    "statistics": lambda: Function(lambda x: (x - ops.mean(x, 0)) / (ops.std(x, 0) + 0.1)),
    "attention over samples": lambda: SelfAttention(0),
}


def built(parts, seed):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((TOKENS, WIDTH)), *(part() for part in parts)])
    model.trainable = False
    return model


def batch(seed, count):
    return np.random.default_rng(seed).standard_normal((count, TOKENS, WIDTH)).astype("float32")


def caller(model, how):
    return (
        model if how == "eager" else tf.function(model.__call__, input_signature=[tf.TensorSpec([None, TOKENS, WIDTH])])
    )


own = st.lists(st.sampled_from(sorted(OWN)), min_size=1, max_size=4)
seeds, counts = st.integers(0, 2**20), st.integers(3, 40)


@HOW
@settings(max_examples=15)
@given(own, seeds, counts)
def test_layers_that_compute_each_sample_by_itself_are_served(how, names, seed, count):
    model, x = built([OWN[name] for name in names], seed), batch(seed, count)
    cache = KVCache(256)
    cache.attach(model, kind="activation", check_in_parts=True)
    run = caller(model, how)
    with warnings.catch_warnings(), cache:
        warnings.filterwarnings("error", category=KVCacheWarning)
        for inputs in (x, x, np.concatenate([x[:1], batch(seed + 1, 2)])):
            np.testing.assert_allclose(run(inputs), model.call.original(tf.constant(inputs)), rtol=1e-4, atol=1e-5)
    assert cache.stats().bypassed_calls == 0 and cache.stats().hit_entries == count + 1
    cache.detach()


@HOW
@settings(max_examples=15)
@given(st.lists(st.sampled_from(["dense", "tanh", "flip"]), max_size=2), st.sampled_from(sorted(MIXING)), seeds, counts)
def test_layers_that_mix_samples_are_bypassed(how, names, mixes, seed, count):
    model, x = built([*(OWN[name] for name in names), MIXING[mixes]], seed), batch(seed, count)
    expected, other = model(x), model(x[:-1])
    cache = KVCache(256)
    cache.attach(model, kind="activation", check_in_parts=True)
    run = caller(model, how)
    with cache:
        with pytest.warns(KVCacheWarning, match="other samples of its batch"):
            np.testing.assert_allclose(run(x), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(run(x), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(run(x[:-1]), other, rtol=1e-5, atol=1e-6)
    stats = cache.stats()
    assert (stats.bypassed_calls, stats.hit_entries, stats.entries) == (3, 0, 0)
    assert list(stats.bypass_reasons) == ["a sample's result depends on the other samples of its batch"]
    cache.detach()


@HOW
def test_single_samples_and_equal_ones_before_the_first_batch_prove_nothing(how):
    layer, x = Function(lambda x: x - ops.mean(x, 0)), batch(0, 6)
    cache = KVCache(64)
    cache.attach(layer, check_in_parts=True)
    run = caller(layer, how)
    with cache:
        for row in range(6):
            np.testing.assert_array_equal(run(x[row : row + 1]), x[:1] * 0)
        np.testing.assert_allclose(run(np.repeat(x[:1], 6, 0)), np.zeros_like(x), atol=1e-6)
        assert cache.stats().entries == 6
        with pytest.warns(KVCacheWarning, match="other samples"):
            np.testing.assert_allclose(run(x), x - x.mean(0), atol=1e-6)


def test_what_is_shown_in_a_graph_counts_for_eager_calls_and_other_graphs():
    rows = []

    def count(x):
        rows.append(len(x))
        return x

    layer = Function(lambda x: tf.ensure_shape(tf.numpy_function(count, [x], x.dtype), x.shape) * 2.0)
    cache, x = KVCache(64), batch(0, 6)
    cache.attach(layer, check_in_parts=True)
    with cache:
        for run in (caller(layer, "graph"), caller(layer, "graph"), layer):
            run(x)
    assert rows == [6, 6, 6] and cache.stats().hit_entries == 12, "whole, and two parts repeated to the same size"


def test_a_graph_that_raises_in_a_part_is_right_from_then_on():
    """In a graph nothing can catch what a module raises; parts as large as the batch make that rare."""

    def even(x):
        with tf.control_dependencies([tf.debugging.assert_less(tf.abs(tf.reduce_sum(x[0] - x[2])), 1e-3)]):
            return tf.identity(x)

    layer, x = Function(even), batch(0, 6)
    x[2] = x[0]
    cache = KVCache(64)
    cache.attach(layer, check_in_parts=True)
    run = caller(layer, "graph")
    with cache:
        with pytest.raises(tf.errors.InvalidArgumentError):
            run(x)
        for _ in range(2):
            np.testing.assert_array_equal(run(x), x)
    assert cache.stats().entries == 0 and cache.stats().bypassed_calls == 2


def test_a_module_in_groups_of_samples_in_a_graph():
    layer, x = (
        Function(lambda x: ops.reshape(ops.softmax(ops.reshape(x, (-1, 3, TOKENS * WIDTH)), 1), ops.shape(x))),
        batch(0, 6),
    )
    cache = KVCache(64)
    expected = layer(x)
    cache.attach(layer, check_in_parts=True)
    run = caller(layer, "graph")
    with cache, pytest.warns(KVCacheWarning, match="other samples"):
        np.testing.assert_allclose(run(x), expected, rtol=1e-5)


@HOW
def test_mixed_precision_is_measured_as_such(how):
    policy = keras.mixed_precision.dtype_policy()
    keras.mixed_precision.set_dtype_policy("mixed_bfloat16")
    try:
        model = built([OWN["attention"], OWN["dense"], lambda: layers.Dense(WIDTH, dtype="float32")], 0)
    finally:
        keras.mixed_precision.set_dtype_policy(policy)
    cache = KVCache(64)
    cache.attach(model, kind="activation", check_in_parts=True)
    run = caller(model, how)
    with cache:
        run(batch(0, 32))
        run(batch(0, 32))
    assert cache.stats().hit_entries == 32
