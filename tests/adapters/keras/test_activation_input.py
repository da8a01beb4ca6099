"""Inputs and outputs that a cache of activations cannot take, or only looks as if it could not."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from kvcache_core import KVCacheWarning
from kvcache_keras import KVCache

HOW = pytest.mark.parametrize("how", ["eager", "graph"])


class Counting(layers.Layer):
    """A dense layer that counts the rows it computes and its calls, also in graphs."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(6, 4), initializer=keras.initializers.GlorotUniform(seed=1))
        self.rows = self.calls = 0

    def call(self, x):
        def count(value):
            self.rows += len(value)
            self.calls += 1
            return value

        counted = tf.ensure_shape(tf.numpy_function(count, [x], x.dtype), x.shape)
        return tf.matmul(counted, self.kernel)


@pytest.fixture
def layer():
    layer = Counting()
    layer.build((None, 6))
    layer.built = True
    return layer


def attached(layer, how, cache, **options):
    """The attached layer as a function: eager, or in one graph for all batch sizes."""
    cache.attach(layer, kind="activation", **options)
    return layer if how == "eager" else tf.function(layer.__call__, input_signature=[tf.TensorSpec([None, 6])])


def rows(seed, count=5):
    return np.random.default_rng(seed).standard_normal((count, 6)).astype("float32")


def reasons(cache):
    return list(cache.stats().bypass_reasons)


@HOW
def test_nan_and_signed_zero_are_told_apart_by_bits(layer, how):
    cache = KVCache(64)
    run, x = attached(layer, how, cache), rows(0)
    x[0, 0], x[1, 1] = float("nan"), 0.0
    with cache:
        run(x)
        layer.rows = 0
        y = run(x).numpy()
        assert layer.rows == 0 and np.isnan(y[0]).all() and not np.isnan(y[1:]).any()
        x[1, 1] = -0.0
        run(x)
        assert layer.rows == 1
        x.view(np.uint32)[0, 0] += 1  # another NaN
        run(x)
        assert layer.rows == 2


@HOW
def test_zero_rows(layer, how):
    cache = KVCache(64)
    run = attached(layer, how, cache)
    with cache:
        assert run(np.zeros((0, 6), "float32")).shape == (0, 4)
        assert run(rows(0)).shape == (5, 4)
        assert run(np.zeros((0, 6), "float32")).shape == (0, 4)
    assert cache.stats().entries == 5
    cache.sites.entries.check_valid()


@HOW
def test_a_row_larger_than_the_budget_is_computed_and_not_kept(layer, how):
    x = rows(0)
    expected = layer(x).numpy()
    cache = KVCache(memory=15)
    run = attached(layer, how, cache)
    with cache:
        for _ in range(2):
            np.testing.assert_array_equal(run(x), expected)
    stats = cache.stats()
    assert (stats.entries, stats.refused_entries, stats.hit_entries) == (0, 10, 0)


@HOW
def test_declared_side_effects_run_each_time(layer, how):
    cache = KVCache(8)
    run = attached(layer, how, cache, side_effects=True)
    layer.calls = 0
    with cache:
        for _ in range(3):
            run(rows(0))
    assert layer.calls == 3 and cache.stats().entries == 0
    assert "side_effects=True" in reasons(cache)[0]


@HOW
@pytest.mark.parametrize("what", ["input", "weight"])
def test_what_was_an_alias_of_an_input_or_a_weight_is_a_copy(what, how):
    class Alias(layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(1, 6), initializer="ones", trainable=False)

        def call(self, x):
            return x if what == "input" else tf.broadcast_to(self.kernel.value, tf.shape(x))

    layer, cache = Alias(), KVCache(64)
    layer.build((5, 6))
    layer.built = True
    run, x = attached(layer, how, cache), tf.Variable(rows(0))
    with cache:
        first = run(x.value())
        kept = first.numpy().copy()
        x.assign(x * 0.0)
        layer.kernel.assign(layer.kernel * 3.0)
        np.testing.assert_array_equal(first, kept)
        expected = x.numpy() if what == "input" else np.full((5, 6), 3.0)
        np.testing.assert_array_equal(run(x.value()), expected)
        np.testing.assert_array_equal(run(x.value()), expected)
    cache.sites.entries.check_valid()


@HOW
def test_a_weight_of_the_batchs_size_is_no_row_per_sample(how):
    class Table(layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(5, 6), initializer="ones")

        def call(self, x):
            return self.kernel.value

    layer, cache = Table(), KVCache(64)
    layer.build((5, 6))
    layer.built = True
    run, other = attached(layer, how, cache), np.concatenate([rows(0, 4), rows(1, 1)])
    with cache, pytest.warns(KVCacheWarning, match=r"no row per sample \((for 1 samples )?its shapes are"):  # noqa: PT031
        run(rows(0))  # in a graph the shape is known when it is traced, in eager calls by one sample alone
        assert run(other).shape == (5, 6)
    cache.sites.entries.check_valid()


@pytest.mark.parametrize("what", ["input", "result"])
def test_arrays_changed_afterwards_do_not_change_what_is_kept(layer, what):
    cache, x = KVCache(64), rows(0)
    run = attached(layer, "eager", cache)
    given = x.copy()
    with cache:
        first = run(given)
        kept = first.numpy().copy()
        if what == "input":
            given[:] = 7
        else:
            first = np.asarray(first).copy()
            first[:] = 7
        layer.rows = 0
        np.testing.assert_array_equal(run(x), kept)
    assert layer.rows == 0


class Takes(layers.Layer):
    def call(self, x, other=None):
        return x * 2


@pytest.mark.parametrize(
    "other",
    [
        lambda: (value for value in ()),
        lambda: tf.sparse.from_dense([[1.0, 0.0]]),
        lambda: tf.ragged.constant([[1], [2, 3]]),
        lambda: tf.constant(["text"]),
        lambda: len,
        lambda: [[tf.constant([1.0])], (tf.constant([2.0]), {"deep": [len]})],
    ],
    ids=["generator", "sparse", "ragged", "text", "object", "object deep inside"],
)
@HOW
def test_inputs_that_cannot_be_hashed_are_computed_as_outside(other, how):
    cache = KVCache(8)
    layer, x = cache.attach(Takes(), kind="activation"), rows(0)
    value = other()
    run = (lambda x: layer.call(x, value)) if how == "eager" else tf.function(lambda x: layer.call(x, value))
    with cache:
        with pytest.warns(KVCacheWarning, match="cannot be hashed"):
            np.testing.assert_array_equal(run(tf.constant(x)), x * 2)
        np.testing.assert_array_equal(run(tf.constant(x)), x * 2)
    assert cache.stats().bypassed_calls >= 1 and cache.stats().entries == 0


@HOW
def test_a_ragged_nest_is_an_input_like_any_other(how):
    """Lists of unequal lengths and depths, with tensors of the batch and without."""
    cache = KVCache(64)
    layer, x = cache.attach(Takes(), kind="activation"), tf.constant(rows(0))
    run = layer.call if how == "eager" else tf.function(layer.call)

    def nest(last):
        return [[x, [x + 1.0]], (tf.constant(2.0), {"deep": [last, []]}), ()]

    with cache:
        for last in (3, 3, 4):
            np.testing.assert_array_equal(run(x, nest(last)), x * 2)
    assert (cache.stats().miss_entries, cache.stats().hit_entries) == (10, 5)


# ---- what a layer hands on besides its output ------------------------------------------------------------------------


IDS = np.array([[1, 2, 3, 0, 0, 0], [4, 5, 0, 0, 0, 0], [6, 7, 8, 9, 1, 2]], "int32")


def embedding():
    return layers.Embedding(10, 4, mask_zero=True, embeddings_initializer=keras.initializers.RandomNormal(seed=1))


@HOW
def test_a_mask_that_the_module_makes_reaches_what_comes_behind(how):
    trunk = keras.Sequential([keras.Input((6,), dtype="int32"), embedding(), layers.Dense(4)])
    head = layers.GlobalAveragePooling1D()

    def whole(ids):
        return head(trunk(ids))

    expected, cache = whole(IDS), KVCache(64)
    cache.attach(trunk, kind="activation")
    run = whole if how == "eager" else tf.function(whole, input_signature=[tf.TensorSpec([None, 6], tf.int32)])
    with cache:
        for batch in ([0, 1], [0, 1], [2, 1, 0], [0, 1, 2]):
            np.testing.assert_allclose(run(tf.constant(IDS[batch])), tf.gather(expected, batch), rtol=1e-5)
    assert (cache.stats().hit_entries, cache.stats().miss_entries) == (7, 3)


@HOW
def test_a_mask_that_an_input_carries_is_one_of_the_inputs(how):
    class Inside(layers.Layer):
        """Takes no mask: the layer inside finds it on the tensor."""

        def __init__(self):
            super().__init__()
            self.pool = layers.GlobalAveragePooling1D()

        def call(self, x):
            return self.pool(x)

    part, embed = Inside(), embedding()
    cache = KVCache(64)
    cache.attach(part, kind="activation")
    x = embed(IDS)
    run = part.call if how == "eager" else tf.function(lambda ids: part.call(embed(ids)))
    given = [[0, 1], [2, 1], [0, 1, 2]]
    expected = part.pool(x)
    unmasked = keras.ops.mean(x, axis=1)
    with cache:
        for batch in given:
            ids = tf.constant(IDS[batch])
            found = run(embed(ids) if how == "eager" else ids)
            np.testing.assert_allclose(found, tf.gather(expected, batch), rtol=1e-5)
        np.testing.assert_allclose(part.call(tf.constant(np.asarray(x))), unmasked, rtol=1e-5)
    assert cache.stats().hit_entries == 4


@HOW
def test_a_layer_that_keeps_a_state_is_computed_each_time(how):
    model = keras.Sequential([keras.Input((5, 3), batch_size=2), layers.LSTM(4, stateful=True)])
    parts = np.random.default_rng(0).standard_normal((2, 2, 5, 3)).astype("float32")

    def outputs(run):
        model.layers[0].reset_states()
        return [np.asarray(run(tf.constant(parts[at]))) for at in (0, 1, 0)]

    expected, cache = outputs(model), KVCache(64)
    cache.attach(model, kind="activation")
    run = model if how == "eager" else tf.function(model.__call__)
    with cache:
        for _ in range(2):
            np.testing.assert_allclose(outputs(run), expected, rtol=1e-5, atol=1e-6)
    assert reasons(cache) == ["a layer keeps a state from call to call"] and not cache.stats().hit_entries


class Penalty(layers.Layer):
    def call(self, x):
        self.add_loss(keras.ops.mean(keras.ops.square(x)))
        return x * 2


@pytest.mark.parametrize("kind", ["add_loss", "activity_regularizer"])
@HOW
def test_a_loss_that_the_module_adds_is_not_lost(kind, how):
    inner = Penalty() if kind == "add_loss" else layers.Dense(4, activity_regularizer="l2")
    trunk = keras.Sequential([keras.Input((6,)), inner])
    trunk.trainable = False
    model = keras.Sequential([keras.Input((6,)), trunk, layers.Dense(1)])
    x, y = rows(0, 8), np.ones((8, 1), "float32")
    model.compile("sgd", "mse", run_eagerly=how == "eager")
    expected, cache = model.evaluate(x, y, batch_size=4, verbose=0), KVCache(64)
    cache.attach(trunk, kind="activation")
    model.compile("sgd", "mse", run_eagerly=how == "eager", jit_compile=False)
    with pytest.warns(KVCacheWarning, match="added a loss"), cache:
        found = [model.evaluate(x, y, batch_size=4, verbose=0) for _ in range(2)]
    np.testing.assert_allclose(found, [expected] * 2, rtol=1e-5)
    assert cache.stats().entries == 0


@HOW
def test_a_number_in_the_output_is_no_result_of_a_sample(how):
    class Numbered(layers.Layer):
        def call(self, x):
            return {"twice": x * 2, "number": 3}

    model, cache = Numbered(), KVCache(64)
    cache.attach(model, kind="activation")
    run = model.call if how == "eager" else tf.function(lambda x: model.call(x)["twice"])
    with cache, pytest.warns(KVCacheWarning, match="plain number"):
        run(tf.constant(rows(0)))
    assert cache.stats().entries == 0 and cache.stats().bypassed_calls == 1


class Block(layers.Layer):
    """A layer that does not take ``training`` and hands it on to those within."""

    def __init__(self):
        super().__init__()
        self.dense, self.dropout = layers.Dense(6), layers.Dropout(0.5)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.dropout(self.dense(x))


@HOW
def test_dropout_within_a_frozen_layer_that_does_not_take_training(how):
    block = Block()
    block.trainable = False
    model, cache, x = keras.Sequential([keras.Input((6,)), block]), KVCache(64), rows(0)
    cache.attach(block, kind="activation")
    run = model if how == "eager" else tf.function(model.__call__)
    with cache:
        plain = run(x, training=False)
        np.testing.assert_allclose(run(x), plain, rtol=1e-5)
        hits = cache.stats().hit_entries
        first, second = run(x, training=True), run(x, training=True)
        assert not np.allclose(first, second) and not np.allclose(first, plain)
    assert hits == cache.stats().hit_entries == 5 and reasons(cache) == ["the module draws random numbers"]


@HOW
def test_augmentation_that_is_on_unless_told_otherwise(how):
    layer, cache = layers.RandomFlip(), KVCache(64)
    cache.attach(layer, kind="activation")
    x = np.random.default_rng(0).standard_normal((8, 6, 6, 3)).astype("float32")
    run = layer if how == "eager" else tf.function(layer.__call__)
    with cache:
        for _ in range(3):
            np.testing.assert_array_equal(run(x, training=False), x)
        assert cache.stats().hit_entries == 16
        assert not np.array_equal(run(x), run(x))
    assert cache.stats().hit_entries == 16 and reasons(cache) == ["the module draws random numbers"]


@HOW
def test_strings_in_the_output(how):
    class Text(layers.Layer):
        def call(self, x):
            return tf.strings.as_string(tf.cast(x[:, 0] * 100, tf.int32))

    layer, cache, x = Text(), KVCache(64), rows(0)
    expected = layer(x)
    cache.attach(layer, kind="activation")
    run = layer if how == "eager" else tf.function(layer.__call__)
    with cache:
        for _ in range(2):
            assert run(tf.constant(x)).numpy().tolist() == expected.numpy().tolist()
    assert cache.stats().hit_entries == 5


@HOW
def test_an_input_of_fixed_size_beside_an_open_batch_belongs_to_all_samples(how):
    class Masked(layers.Layer):
        def call(self, x, mask):
            return x[:, None, :] * mask

    layer, cache = Masked(), KVCache(64)
    cache.attach(layer, kind="activation")
    spec = [tf.TensorSpec([None, 6]), tf.TensorSpec([1, 6, 6])]
    run = layer.call if how == "eager" else tf.function(layer.call, input_signature=spec)
    mask = tf.constant(np.tril(np.ones((1, 6, 6), "float32")))
    with cache:
        for x in (rows(0), rows(0)[1:], rows(0, 2)):
            np.testing.assert_allclose(run(tf.constant(x), mask), x[:, None] * mask, rtol=1e-6)
    assert cache.stats().hit_entries == 4 + 2
