"""``with cache:`` around layers and models that are no token models, eager and in graphs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import kvcache_core.activation
import kvcache_keras.graphsite
from kvcache_core import AfterSightings, KVCacheWarning, UsageError
from kvcache_core.tree import flatten
from kvcache_keras import KVCache
from kvcache_keras.activation import Site
from kvcache_keras.graphsite import Traced
from tests.adapters.clock import Clock


@keras.saving.register_keras_serializable(package="tests")
class Counting(layers.Layer):
    """A dense layer that counts the rows it computes, also in graphs."""

    def __init__(self, units=4, **kwargs):
        super().__init__(**kwargs)
        self.units, self.rows, self.traces = units, 0, 0

    def build(self, shape):
        self.dense = layers.Dense(self.units, kernel_initializer=keras.initializers.GlorotUniform(seed=1))
        self.dense.build(shape)

    def call(self, x):
        self.traces += 1

        def count(value):
            self.rows += len(value)
            return value

        counted = tf.ensure_shape(tf.numpy_function(count, [x], x.dtype), x.shape)
        return keras.ops.relu(self.dense(tf.stop_gradient(counted - x) + x))


@pytest.fixture
def layer():
    layer = Counting()
    layer.build((None, 6))
    layer.built = True
    return layer


@pytest.fixture
def cache(layer):
    cache = KVCache(64)
    assert cache.attach(layer) is layer
    return cache


def rows(seed, count=5, width=6):
    return np.random.default_rng(seed).standard_normal((count, width)).astype("float32")


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-5, atol=1e-6)


def caller(how, cache):
    """The attached model as a function: eager, or in one graph for all batch sizes."""
    model = cache.model
    if how == "eager":
        return model
    return tf.function(model.__call__, input_signature=[tf.TensorSpec([None, 6])])


HOW = pytest.mark.parametrize("how", ["eager", "graph"])


@HOW
def test_only_new_rows_are_computed_and_the_order_is_kept(layer, cache, how):
    run, old, new = caller(how, cache), rows(0), rows(1)
    plain = layer(np.concatenate([old, new]))
    with cache:
        layer.rows = 0
        close(run(old), plain[:5])
        assert layer.rows == 5
        close(run(old), plain[:5])
        assert layer.rows == 5, "the second time nothing is computed"
        mixed = np.stack([new[0], old[3], new[1], old[0], new[0]])
        close(run(mixed), tf.gather(plain, [5, 3, 6, 0, 5]))
        assert layer.rows == 7
    stats = cache.stats()
    assert (stats.hit_entries, stats.miss_entries, stats.entries) == (8, 7, 7)
    cache.sites.entries.check_valid()


def test_one_trace_serves_hits_misses_and_all_batch_sizes(layer, cache):
    run = caller("graph", cache)
    layer.traces = 0
    with cache:
        for count in (1, 5, 3, 5, 2):
            run(rows(0, count))
    assert layer.traces == 1
    assert cache.stats().miss_entries == 5


@settings(max_examples=15)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1, max_size=10), st.integers(1, 12))
def test_any_history_of_batches_gives_what_the_model_gives(history, size):
    layer, pool = _shared_layer(), rows(0, 10)
    expected = layer(pool).numpy()
    cache = KVCache(size)
    cache.attach(layer)
    with cache:
        for batch in history:
            close(layer(pool[batch]), expected[batch])
    assert cache.stats().entries <= size
    cache.sites.entries.check_valid()
    cache.detach()


def _shared_layer(made=[]):  # noqa: B006
    if not made:
        made.append(keras.Sequential([keras.Input((6,)), layers.Dense(8, activation="relu"), layers.Dense(3)]))
    return made[0]


@HOW
def test_structured_outputs_and_several_inputs(how):
    one, two = keras.Input((6,), name="one"), keras.Input((6,), dtype="int32", name="two")
    mean = layers.Dense(3)(one)
    model = keras.Model({"one": one, "two": two}, {"a": mean, "b": (layers.Embedding(9, 2)(two), mean * 2.0)})
    cache = KVCache(64)
    cache.attach(model, kind="activation")
    given = {"one": tf.constant(rows(0)), "two": tf.reshape(tf.range(30) % 9, (5, 6))}
    expected = model(given)
    run = model if how == "eager" else tf.function(model.__call__)
    with cache:
        for _ in range(2):
            found = run(given)
            for left, right in zip(tf.nest.flatten(found), tf.nest.flatten(expected), strict=True):
                close(left, right)
            tf.nest.assert_same_structure(found, expected)
    assert cache.stats().hit_entries == 5


@HOW
def test_every_input_and_flag_counts(how):
    class Scaled(layers.Layer):
        def call(self, x, mask=None, scale=1.0, top=False):
            y = x if mask is None else x * mask
            return (y[:, 1:] if top else y) * scale

    cache = KVCache(64)
    model = cache.attach(Scaled())
    run = model.call if how == "eager" else tf.function(model.call)
    x, mask = tf.constant(rows(0)), np.ones((5, 6), "float32")
    other = mask.copy()
    other[2, 3:] = 0
    with cache:
        close(run(x, tf.constant(mask)), x)
        for flags in ({"scale": 2.0}, {"top": True}, {"scale": 2.0, "top": True}):
            close(run(x, tf.constant(mask), **flags), (x[:, 1:] if "top" in flags else x) * flags.get("scale", 1.0))
        assert cache.stats().hit_entries == 0
        close(run(x, tf.constant(other)), x * other)
    assert (cache.stats().hit_entries, cache.stats().miss_entries) == (4, 20 + 1)


@HOW
def test_changed_weights_are_noticed_also_in_a_traced_graph(layer, cache, how):
    run, x = caller(how, cache), rows(0)
    with cache:
        run(x)
    changes = [
        lambda: layer.dense.kernel.assign(layer.dense.kernel * 2.0),
        lambda: layer.set_weights([w + 1.0 for w in layer.get_weights()]),
        lambda: layer.dense.bias.assign_add(np.ones(4, "float32")),
        lambda: layer.dense.kernel.value.scatter_nd_update([[2, 1]], [9.0]),
    ]
    for change in changes:
        change()
        expected = keras.ops.relu(layer.dense(x))
        with cache:
            close(run(x), expected)
    assert cache.stats().hit_entries == 0


def test_graphs_side_by_side_go_by_their_own_weights(layer, cache, monkeypatch):
    """A graph whose look-up is overtaken by another's still goes by the weights that it found itself."""
    with cache:
        run = tf.function(layer)
        run(tf.constant(rows(0)))
    (site,) = cache.sites
    plain, states = Site.form, []

    def overtaken(self, output):
        if not states:
            states.append(self._state())
            with ThreadPoolExecutor(1) as thread:
                thread.submit(run, tf.constant(rows(1))).result()
            states.append(self._state())
        return plain(self, output)

    monkeypatch.setattr(Site, "form", overtaken)
    found = site.weights.digest()
    layer.dense.kernel.assign(layer.dense.kernel * 2.0)
    tree = flatten(((rows(2),), {}), site.is_tensor)[1]
    site.begin(Traced(tree, [True], [tf.float32], b"", tree), [rows(2)], found)
    assert states == [found, found]


@pytest.mark.parametrize("verify", ["full", "never"])
def test_verify(layer, verify):
    cache = KVCache(64, verify=verify)
    cache.attach(layer)
    x = rows(0)
    with cache:
        first = layer(x)
        layer.dense.kernel.assign(layer.dense.kernel * 2.0)
        second = layer(x)
        cache.invalidate()
        third = layer(x)
    assert np.array_equal(first, second) == (verify == "never")
    close(third, keras.ops.relu(layer.dense(x)))


# ---- what is not served ----------------------------------------------------------------------------------------------


def reasons(cache):
    return list(cache.stats().bypass_reasons)


@HOW
def test_training_is_bypassed_with_the_same_gradients(layer, cache, how):
    x = tf.constant(rows(0))

    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x) ** 2)
        return tape.gradient(loss, layer.trainable_variables)

    expected = step()
    with cache:
        found = (step if how == "eager" else tf.function(step))()
    for left, right in zip(found, expected, strict=True):
        close(left, right)
    assert "being trained" in reasons(cache)[0] and cache.stats().entries == 0


def test_inputs_that_need_gradients_are_bypassed(layer, cache):
    layer.trainable = False
    x = tf.Variable(rows(0))
    with cache, tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x * 2.0))
    assert tape.gradient(loss, x) is not None
    assert reasons(cache) == ["an input needs gradients"]


def test_dropout_of_a_frozen_module_in_training_mode():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4), layers.Dropout(0.5)])
    model.trainable = False
    cache = KVCache(64)
    cache.attach(model)
    with cache:
        model(rows(0), training=True)
        assert reasons(cache) == ["the module draws random numbers"]
        close(model(rows(0)), model(rows(0), training=False))
    assert cache.stats().hit_entries == 5


@pytest.mark.parametrize("output", [keras.ops.sum, lambda x: (x, keras.ops.sum(x))])
@HOW
def test_outputs_without_a_row_per_sample(output, how):
    class Takes(layers.Layer):
        def call(self, x):
            return output(x)

    cache = KVCache(8)
    cache.attach(Takes())
    run = caller(how, cache)
    with cache, pytest.warns(KVCacheWarning, match="no row per sample"):
        run(rows(0))
    assert cache.stats().bypassed_calls == 1


def test_ragged_inputs_are_computed_as_outside():
    class Takes(layers.Layer):
        def call(self, x, other):
            return x * 2

    cache = KVCache(8)
    model = cache.attach(Takes())
    with cache, pytest.warns(KVCacheWarning, match="cannot be hashed"):
        close(model.call(tf.constant(rows(0)), tf.ragged.constant([[1], [2, 3]])), rows(0) * 2)


def test_an_exception_in_a_graph_loses_nothing(layer, cache):
    @tf.function(input_signature=[tf.TensorSpec([None, 6])])
    def run(x):
        y = layer(x)
        tf.debugging.assert_less(tf.reduce_max(x), 50.0)
        return y

    with cache:
        with pytest.raises(tf.errors.InvalidArgumentError):
            run(rows(0) + 100)
        close(run(rows(0)), layer.original(rows(0)) if hasattr(layer, "original") else run(rows(0)))
    cache.sites.entries.check_valid()


# ---- whether it pays -------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch, kvcache_core.activation, kvcache_keras.graphsite)


@pytest.mark.usefixtures("clock")
@HOW
def test_a_layer_too_small_for_a_cache_is_left_out_and_said_so(layer, how):
    """Finding all rows takes a second, as computing them does; keeping them took two."""
    cache = KVCache(64, bypass="auto")
    cache.attach(layer)
    run, x, expected = caller(how, cache), tf.constant(rows(0)), layer(rows(0))
    layer.rows = 0
    with cache:
        for _ in range(300):
            close(run(x), expected)
    stats = cache.stats()
    assert stats.bypass_reasons == {"the cache costs more than it saves": 300 - 32}
    assert layer.rows >= 5 * (300 - 32), "and the layer computes"
    assert stats.seconds_spent > stats.seconds_saved > 0


@HOW
def test_a_layer_that_pays_is_not_left_out(clock, how):
    class Slow(layers.Layer):
        def call(self, x):
            def wait(value):
                clock.now += 100
                return value * 2

            return tf.ensure_shape(tf.numpy_function(wait, [x], x.dtype), x.shape)

    cache = KVCache(64, bypass="auto")
    cache.attach(Slow())
    run, x = caller(how, cache), tf.constant(rows(0))
    with cache:
        for _ in range(80):
            close(run(x), rows(0) * 2)
        stats = cache.stats()
        assert stats.bypassed_calls == 0 and stats.hit_entries == 5 * 79
        assert 70 * 100 < stats.seconds_saved < 90 * 100 > 10 * stats.seconds_spent


# ---- the cache's own -------------------------------------------------------------------------------------------------


def test_admission_warm_resize_clear(layer):
    cache = KVCache(64, admit=AfterSightings(2))
    cache.attach(layer)
    assert cache.warm([rows(0), rows(0)]) == 10
    assert cache.warm(rows(0)) == 0, "one batch alone"
    assert cache.warm(np.asarray(rows(0))) == 0, "an array is found as the tensor of the same values"
    assert cache.stats().entries == 5
    cache.resize(3)
    assert cache.stats().entries == 3
    cache.clear()
    assert cache.stats().entries == 0


def test_warm_draws_a_bar_and_stats_advise(layer, cache, capsys):
    cache.record(100)
    x = tf.random.normal((3, 6))
    assert cache.warm([x, x], bar=True) == 3
    assert capsys.readouterr().err.endswith("] 2/2\n")
    assert "recorded accesses" in str(cache.stats(advice=True))


def test_detach_gives_back_exactly_the_layer(layer):
    before = (layer.supports_masking, layer.supports_jit, layer._call_signature)
    cache = KVCache(8)
    cache.attach(layer)
    with cache:
        layer(rows(0))
    cache.detach()
    assert "call" not in vars(layer)
    assert (layer.supports_masking, layer.supports_jit, layer._call_signature) == before
    with pytest.raises(UsageError, match="no model is attached"):
        cache.detach()


def frozen_trunk_and_head(seed=0):
    keras.utils.set_random_seed(seed)
    trunk = keras.Sequential(
        [keras.Input((6,)), layers.Dense(16, activation="relu"), layers.BatchNormalization(), Counting(8)], name="trunk"
    )
    trunk.trainable = False
    model = keras.Sequential([keras.Input((6,)), trunk, layers.Dense(3)])
    return trunk, model


def test_fit_computes_a_frozen_trunk_once_per_sample():
    x, y = rows(0, 40), np.arange(40) % 3
    histories, weights = [], []
    for use in (False, True):
        trunk, model = frozen_trunk_and_head()
        cache = KVCache(64)
        cache.attach(trunk, kind="activation")
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        assert not model.jit_compile
        counting = trunk.layers[-1]
        counting.rows = 0
        keras.utils.set_random_seed(1)
        if use:
            with cache:
                history = model.fit(x, y, batch_size=8, epochs=4, verbose=0)
            assert counting.rows == 40
            assert cache.stats().hit_entries == 120
        else:
            history = model.fit(x, y, batch_size=8, epochs=4, verbose=0)
            assert counting.rows == 160
        histories.append(history.history["loss"])
        weights.append(model.get_weights())
    np.testing.assert_allclose(*histories, rtol=1e-5)
    for left, right in zip(*weights, strict=True):
        close(left, right)


def test_fit_with_random_augmentation_misses_and_is_right():
    keras.utils.set_random_seed(0)
    trunk = keras.Sequential([keras.Input((6,)), layers.Dense(4)])
    trunk.trainable = False
    model = keras.Sequential([keras.Input((6,)), layers.GaussianNoise(0.5), trunk, layers.Dense(3)])
    cache = KVCache(512)
    cache.attach(trunk, kind="activation")
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with cache:
        model.fit(rows(0, 20), np.arange(20) % 3, batch_size=5, epochs=3, verbose=0)
    assert cache.stats().hit_entries == 0 and cache.stats().miss_entries == 60
