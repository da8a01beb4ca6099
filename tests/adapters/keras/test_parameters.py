"""``ParameterCache``: the same results with weights that are read when they are used, eager and in graphs."""

from __future__ import annotations

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache_core import BlockRefused, InvalidInput, UsageError
from kvcache_keras import KVCache, ParameterCache, empty_weights, generate
from tests.adapters.keras.models import Small, greedy, ids, in_graph, sequential


class Nested(keras.Model):
    """Weights of its own around layers, one of them used twice, one weight shared."""

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.scale = self.add_weight(shape=(width,), initializer="ones")
        self.inner = [keras.layers.Dense(width, activation="tanh") for _ in range(depth)]
        self.norm = keras.layers.BatchNormalization()
        self.heads = keras.layers.MultiHeadAttention(2, 4)
        for layer in (*self.inner, self.norm):
            layer.build((None, None, width))
        self.heads.build((None, None, width), (None, None, width))
        self.tied = self.inner[0].kernel
        self.built = True

    def call(self, x):
        for layer in (*self.inner, self.inner[0]):
            x = layer(x)
        x = self.heads(x, x)
        return keras.ops.matmul(self.norm(x), self.tied) * self.scale


def nested(seed: int = 0, **options: int) -> Nested:
    keras.utils.set_random_seed(seed)
    model = Nested(**options)
    random = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(variable + 0.1 * random.random(variable.shape))
    return model


def inputs(width: int = 8) -> tf.Tensor:
    return tf.constant(np.random.default_rng(1).normal(size=(2, 3, width)).astype("float32"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def held(model) -> int:
    return sum(
        int(tf.size(variable._value.read_value())) * variable._value.dtype.size
        for variable in {id(variable): variable for variable in model.weights}.values()
    )


@given(st.integers(2, 6), st.integers(1, 3), st.floats(0, 1), st.integers(0, 99), st.booleans(), st.booleans())
@settings(max_examples=12)
def test_the_same_as_with_all_weights(tmp_path_factory, width, depth, share, seed, empty, in_graph):
    path = tmp_path_factory.mktemp("parameters") / "file"
    model = nested(seed, width=width, depth=depth)
    x = inputs(width)
    expected = model(x)
    ParameterCache.save(model, path)
    names = len(model.weights)
    if empty:
        with empty_weights():
            model = Nested(width, depth)
    total = sum(4 * int(np.prod(variable.shape)) for variable in model.weights)
    least = 4 * (width + width * width + 2 * max(8 * width + 8, width * width + width))
    parameters = ParameterCache(path, memory=int(least + share * max(0, total - least)))
    assert parameters.attach(model) is model
    run = tf.function(model) if in_graph else model
    for _ in range(3):
        np.testing.assert_allclose(run(x), expected, rtol=1e-5, atol=1e-6)
        parameters.residence.check_valid()
        assert held(model) == parameters.stats().bytes <= parameters.stats().memory
    parameters.detach()
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    assert "call" not in vars(model) and len(model.weights) == names and held(model) == total


def dense_stack(depth: int = 3) -> keras.Model:
    layers = [keras.layers.Dense(4, use_bias=False) for _ in range(depth)]
    return keras.Sequential([keras.Input((4,)), *layers])


def test_least_recently_used_first_and_bytes_are_counted(path):
    model = dense_stack()
    ParameterCache.save(model, path)
    parameters = ParameterCache(path, memory=2 * 64)
    parameters.attach(model)
    for layer in (0, 1, 0, 2, 0, 1):
        model.layers[layer](tf.ones((1, 4)))
    units = parameters.stats().units
    assert [(units[f"layers.{at}"].hits, units[f"layers.{at}"].misses) for at in range(3)] == [(2, 1), (0, 2), (0, 1)]
    assert parameters.stats().bytes_read == 4 * 64 and parameters.stats().evicted == 2


def test_branches_of_a_graph_hold_one_after_the_other(path):
    """Nothing but the cache orders layers that do not depend on each other."""
    model = dense_stack(6)
    ParameterCache.save(model, path)
    x = tf.ones((1, 4))
    expected = sum(layer(x) for layer in model.layers)
    parameters = ParameterCache(path, memory=64)
    parameters.attach(model)

    @tf.function
    def branches(x):
        return sum(layer(x) for layer in model.layers)

    @tf.function
    def loop(x):
        for _ in tf.range(3):
            x = model(x)
        return x

    np.testing.assert_allclose(branches(x), expected, rtol=1e-6)
    looped = loop(x)
    assert parameters.stats().peak_bytes == 64
    parameters.detach()
    np.testing.assert_allclose(looped, model(model(model(x))), rtol=1e-6)


def test_a_graph_that_raises_lets_go(path):
    model = dense_stack()
    ParameterCache.save(model, path)
    parameters = ParameterCache(path, memory=64)
    parameters.attach(model)

    @tf.function(autograph=False)
    def run(x, zero):
        y = model.layers[0](x)
        with tf.control_dependencies([tf.debugging.assert_none_equal(zero, 0)]):
            return model.layers[1](tf.identity(y))

    for _ in range(3):
        with pytest.raises(tf.errors.InvalidArgumentError):
            run(tf.ones((1, 4)), tf.constant(0))
    run(tf.ones((1, 4)), tf.constant(1))
    parameters.clear()
    assert parameters.stats().bytes == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_the_models_dtype_counts(path, dtype):
    def build(kind):
        keras.utils.set_random_seed(0)
        layers = [keras.Input((4,), dtype=kind), keras.layers.Dense(4, dtype=kind), keras.layers.Dense(3, dtype=kind)]
        return keras.Sequential(layers)

    ParameterCache.save(build("float32"), path)
    model, x = build(dtype), tf.ones((1, 4), dtype)
    for one, other in zip(model.weights, build("float32").weights, strict=True):
        one.assign(tf.cast(other._value, dtype))
    expected = model(x)
    ParameterCache(path, memory="1MiB").attach(model)
    np.testing.assert_array_equal(tf.cast(model(x), "float64"), tf.cast(expected, "float64"))


@pytest.mark.parametrize("kind", ["tokens", "activation"])
def test_with_a_kv_cache_behind_it(path, kind):
    model, other = Small(layers=1), Small(layers=1)
    prompts = [ids(9).tolist(), ids(14, seed=1).tolist()]
    x = tf.constant(ids(1, 9))
    expected = model(x)
    other(x)
    other.set_weights(model.get_weights())
    ParameterCache.save(model, path)
    sizes = [4 * int(np.prod(variable.shape)) for variable in model.weights]
    parameters = ParameterCache(path, memory=max(sum(sizes) // 2, 2 * max(sizes)))
    parameters.attach(model)
    cache = KVCache(64)
    cache.attach(model, kind=kind)
    with cache:
        for _ in range(2):
            np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    assert cache.stats().hit_tokens + cache.stats().hit_entries > 0
    if kind == "tokens":
        plain = KVCache(64)
        plain.attach(other)
        assert generate(model, prompts, max_new_tokens=5, cache=cache) == greedy(other, prompts, 5)
        assert cache._portable_identity() == plain._portable_identity()
    with pytest.raises(UsageError, match=r"attached to a KVCache"):
        parameters.detach()
    cache.detach()
    parameters.detach()
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)


def test_another_file_is_another_model(tmp_path):
    """What was computed with one file's weights is not found with another's."""
    cache, model, x = KVCache(64), nested(), inputs()
    answers = []
    for seed in (0, 1):
        ParameterCache.save(nested(seed), tmp_path / str(seed))
        parameters = ParameterCache(tmp_path / str(seed), memory="1MiB")
        parameters.attach(model)
        cache.attach(model, kind="activation")
        with cache:
            answers.append(model(x))
        cache.detach()
        parameters.detach()
        np.testing.assert_allclose(answers[-1], nested(seed)(x), rtol=1e-5, atol=1e-6)
    assert not np.array_equal(*answers)


@pytest.mark.parametrize("verify", ["sample", "full", "never"])
def test_a_graph_goes_by_the_same_file(tmp_path, verify):
    """In a graph too: what was computed eagerly is found, and nothing that was computed with another file's weights."""
    cache, model, x = KVCache(64, verify=verify), sequential(), tf.constant(ids(1, 9))
    for seed in (0, 1):
        keras.utils.set_random_seed(seed)
        other = sequential()
        expected = other(x)
        ParameterCache.save(other, tmp_path / str(seed))
        parameters = ParameterCache(tmp_path / str(seed), memory="1MiB")
        parameters.attach(model)
        cache.attach(model, kind="tokens")
        with pytest.raises(UsageError, match="cannot be compiled"):
            cache.compile()
        with cache:
            graph = in_graph(model)
            np.testing.assert_allclose(graph(x), expected, rtol=1e-4, atol=1e-5)
            hits = cache.stats().hit_tokens
            np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)
            assert cache.stats().hit_tokens > hits
        cache.detach()
        parameters.detach()


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_too_little_memory(path):
    model = dense_stack()
    ParameterCache.save(model, path)
    with pytest.raises(InvalidInput, match=r"memory=63 bytes is too small: module 'layers.0' .* need 64 bytes"):
        ParameterCache(path, memory=63).attach(model)
    model(tf.ones((1, 4)))
    parameters = ParameterCache(path, memory=64)
    parameters.attach(model)
    with pytest.raises(InvalidInput, match=r"too small"):
        parameters.resize(60)
    model(tf.ones((1, 4)))


def test_missing_and_misshapen_weights(path):
    ParameterCache.save(dense_stack(2), path)
    with pytest.raises(
        InvalidInput, match=r"lacks 1 of the model's 3 weights: layers.2.kernel; it has layers.0.kernel"
    ):
        ParameterCache(path, memory="1MiB").attach(dense_stack(3))
    wide = keras.Sequential([keras.Input((4,)), keras.layers.Dense(9, use_bias=False)])
    with pytest.raises(InvalidInput, match=r"'layers.0.kernel' has shape \(4, 9\), in the file \(4, 4\)"):
        ParameterCache(path, memory="1MiB").attach(wide)
    with pytest.raises(UsageError, match=r"no weights yet"):
        ParameterCache(path, memory="1MiB").attach(keras.Sequential([keras.layers.Dense(4)]))
    with pytest.raises(InvalidInput, match=r"attaches a Keras model"):
        ParameterCache(path, memory="1MiB").attach(len)


def test_a_damaged_file(path):
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(BlockRefused):
        ParameterCache(path, memory="1MiB")


def test_a_file_that_changes_under_it(path):
    model = dense_stack()
    ParameterCache.save(model, path)
    parameters = ParameterCache(path, memory=64)
    parameters.attach(model)
    model(tf.ones((1, 4)))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(RuntimeError, match="was changed since it was opened"):  # Keras's wrapping of BlockRefused
        model(tf.ones((1, 4)))
    parameters.residence.check_valid()


def test_training(path):
    model = dense_stack()
    ParameterCache.save(model, path)
    parameters = ParameterCache(path, memory="1MiB")
    parameters.attach(model)
    x = tf.Variable(tf.ones((1, 4)))
    with pytest.raises(UsageError, match=r"needs gradients"), tf.GradientTape():
        model(x.value())
    with pytest.raises(UsageError, match=r"cannot be trained"):
        model.layers[0].call(tf.ones((1, 4)), training=True)
    assert not model.trainable_variables
    parameters.detach()
    assert len(model.trainable_variables) == 3
    parameters.attach(model)
    with pytest.raises(UsageError, match=r"before copying it"):
        copy.deepcopy(model.layers[0].call)


def test_weights_that_are_not_there_are_never_used(path):
    model = dense_stack()
    ParameterCache.save(model, path)
    ParameterCache(path, memory="1MiB").attach(model)
    with pytest.raises(tf.errors.InvalidArgumentError):
        tf.matmul(tf.ones((1, 4)), model.layers[0].kernel._value)


def test_attached_twice(path):
    model = dense_stack()
    ParameterCache.save(model, path)
    parameters = ParameterCache(path, memory="1MiB")
    parameters.attach(model)
    with pytest.raises(UsageError, match=r"has a model already"):
        parameters.attach(dense_stack())
    with pytest.raises(UsageError, match=r"another ParameterCache"):
        ParameterCache(path, memory="1MiB").attach(model)
    parameters.detach()
    KVCache(8).attach(model, kind="activation")
    with pytest.raises(UsageError, match=r"before the KVCache"):
        parameters.attach(model)
