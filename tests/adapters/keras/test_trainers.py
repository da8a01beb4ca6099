"""``fit``, ``evaluate`` and ``predict`` inside and outside ``with cache:``, in whatever order."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from kvcache_keras import KVCache
from tests.adapters.keras.models import Small, ids, tensor


@keras.saving.register_keras_serializable()
class Traced(layers.Dense):
    """Counts how often it is traced; calls for shapes alone do not count."""

    def __init__(self, units, **options):
        super().__init__(units, **options)
        self.traces = []

    def call(self, x):
        if not tf.executing_eagerly():
            self.traces.append(x.shape)
        return super().call(x)


def build():
    """A frozen trunk, and a model with a head on it."""
    keras.utils.set_random_seed(0)
    trunk = keras.Sequential([keras.Input((6,)), layers.Dense(8, activation="relu"), Traced(4)])
    trunk.trainable = False
    model = keras.Sequential([keras.Input((6,)), trunk, layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    trunk.layers[-1].traces.clear()
    return trunk, model


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(12, 6)).astype("float32"), rng.integers(0, 3, 12)


def predict(model, x):
    return model.predict(x, batch_size=4, verbose=0)


@pytest.mark.parametrize("predicts", ["the trunk", "a model around it"])
@pytest.mark.parametrize("first", ["before attach", "after attach"])
def test_predicted_outside_first_a_model_is_served_inside(data, first, predicts):
    trunk, around = build()
    model = trunk if predicts == "the trunk" else around
    cache = KVCache(64)
    if first == "after attach":
        cache.attach(trunk, kind="activation")
    expected = predict(model, data[0])
    if first == "before attach":
        cache.attach(trunk, kind="activation")
    with cache:
        np.testing.assert_allclose(predict(model, data[0]), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(predict(model, data[0]), expected, rtol=1e-5, atol=1e-6)
    assert (cache.stats().hit_entries, cache.stats().miss_entries) == (12, 12)
    np.testing.assert_allclose(predict(model, data[0]), expected, rtol=1e-5, atol=1e-6)
    assert (cache.stats().hit_entries, cache.stats().miss_entries) == (12, 12), "outside was served"


def test_each_side_is_traced_once(data):
    trunk, model = build()
    cache = KVCache(64)
    cache.attach(trunk, kind="activation")
    traces = trunk.layers[-1].traces
    counts = []
    for turn in range(6):
        with cache if turn % 2 else contextlib.nullcontext():
            predict(model, data[0])
        counts.append(len(traces))
    assert counts[0] < counts[1] == counts[2] == counts[5]


def test_fitted_outside_first_the_trunk_is_computed_once_inside(data):
    def losses(cache):
        trunk, model = build()
        found = model.fit(*data, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]
        if cache is not None:
            cache.attach(trunk, kind="activation")
        with cache or contextlib.nullcontext():
            found += model.fit(*data, batch_size=4, epochs=3, shuffle=False, verbose=0).history["loss"]
            if cache is not None:
                assert (cache.stats().miss_entries, cache.stats().hit_entries) == (12, 24)
            found.append(model.evaluate(*data, batch_size=4, verbose=0))
        found += model.fit(*data, batch_size=4, epochs=1, shuffle=False, verbose=0).history["loss"]
        return found

    np.testing.assert_allclose(losses(KVCache(64)), losses(None), rtol=1e-5)


def test_compiled_anew_and_made_by_force_all_functions_are_made_again(data):
    trunk, model = build()
    cache = KVCache(64)
    cache.attach(trunk, kind="activation")
    traces = trunk.layers[-1].traces
    before = 0
    for change in (lambda: None, lambda: model.compile("sgd", "mse"), lambda: model.make_predict_function(force=True)):
        change()
        for around in (contextlib.nullcontext(), cache, contextlib.nullcontext(), cache):
            with around:
                predict(model, data[0])
        assert len(traces) > before
        before = len(traces)


def test_a_function_of_the_users_own_is_left_alone(data):
    trunk, model = build()
    cache = KVCache(64)
    cache.attach(trunk, kind="activation")
    predict(model, data[0])
    model.predict_function = mine = lambda batch: batch[0][0] * 0 + 7  # Keras hands it a list of batches
    with cache:
        assert (predict(model, data[0]) == 7).all()
    assert (predict(model, data[0]) == 7).all()
    assert model.predict_function is mine


def test_detached_a_model_lets_go_of_what_it_was_served_by(data):
    trunk, model = build()
    expected = predict(model, data[0])
    cache = KVCache(64)
    cache.attach(trunk, kind="activation")
    with cache:
        predict(model, data[0])
    cache.detach()
    gone = weakref.ref(cache)
    del cache
    np.testing.assert_allclose(predict(model, data[0]), expected, rtol=1e-6)
    gc.collect()
    assert gone() is None


def test_a_token_model_predicted_outside_first_is_served_inside():
    model = Small(layers=1)
    x = np.asarray(tensor(ids(2, 9)))
    expected = model.predict(x, verbose=0)
    cache = KVCache(64, block_size=4)
    cache.attach(model)
    with cache:
        for _ in range(2):
            np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-5, atol=1e-5)
    assert cache.stats().hit_tokens >= 16
    cache.detach()


def test_a_copy_has_no_functions_of_the_first(data):
    trunk, model = build()
    cache = KVCache(64)
    cache.attach(trunk, kind="activation")
    with cache:
        expected = predict(model, data[0])
    np.testing.assert_allclose(predict(copy.deepcopy(model), data[0]), expected, rtol=1e-5, atol=1e-6)
    assert cache.stats().hit_entries == 0


def activations_of(cache, x):
    trunk, _ = build()
    cache.attach(trunk, kind="activation")
    return trunk, x


def tokens_of(cache, x):
    model = Small(layers=1)
    cache.attach(model)
    return model, tensor(ids(2, 9))


@pytest.mark.parametrize("attach", [activations_of, tokens_of])
def test_what_a_graph_of_the_users_called_on_ends_with_the_graph(attach, data):
    def use():
        cache = KVCache(64, block_size=4)
        model, x = attach(cache, data[0])
        run = tf.function(lambda x: tf.cond(tf.size(x) > 0, lambda: model(x), lambda: model(x) + 1))
        with cache:
            first = run(x)
            gc.collect()  # the graph still finds what it calls
            np.testing.assert_allclose(run(x), first, rtol=1e-5, atol=1e-6)
        assert cache.stats().hit_entries + cache.stats().hit_tokens > 0
        return weakref.ref(cache), weakref.ref(model)

    gone = use()
    gc.collect()
    assert [one() for one in gone] == [None, None]
