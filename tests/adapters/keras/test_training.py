"""Training under ``with cache:`` in Keras: the same losses, gradients and weights as without it."""

from __future__ import annotations

import contextlib

import keras
import numpy as np
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from kvcache_keras import KVCache

LAYERS = {
    "dense": lambda: layers.Dense(6, activation="tanh"),
    "norm": layers.LayerNormalization,
    "batch": layers.BatchNormalization,
    "dropout": lambda: layers.Dropout(0.3, seed=3),
    "gelu": lambda: layers.Activation("gelu"),
}
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.05),
}


def build(names, seed, *, frozen):
    keras.utils.set_random_seed(seed)
    trunk = keras.Sequential([keras.Input((6,)), *(LAYERS[name]() for name in names), layers.Dense(6)])
    trunk.trainable = not frozen
    return trunk, keras.Sequential([keras.Input((6,)), trunk, layers.Dense(2)])


def train(model, batches, optimizer, around, *, evaluate, in_graph):
    """A few steps, each with an inference step behind it; what was seen on the way."""
    update = OPTIMIZERS[optimizer]()
    update.build(model.trainable_variables)

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        update.apply(gradients, model.trainable_variables)
        return [loss, *gradients]

    run = tf.function(step) if in_graph else step
    seen = []
    for x, y in batches:
        with around():
            seen += run(x, y)
        if evaluate:
            with around():
                seen.append(model(x, training=False))
    return [np.asarray(one) for one in (*seen, *model.get_weights())]


def batches_of(seed, steps):
    random = np.random.default_rng(seed)
    pool = [(random.normal(size=(5, 6)), random.normal(size=(5, 2))) for _ in range(2)]
    return [tuple(tf.constant(part, tf.float32) for part in pool[step % 2]) for step in range(steps)]


@settings(max_examples=8)
@given(
    st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=3),
    st.sampled_from(sorted(OPTIMIZERS)),
    st.integers(0, 3),
    st.integers(2, 4),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["whole", "frozen trunk", "trained trunk", "both"]),
)
def test_training_is_the_same_with_a_cache(names, optimizer, seed, steps, evaluate, in_graph, attached):
    frozen = attached in ("frozen trunk", "both")
    data = batches_of(seed, steps)
    results = []
    for use in (False, True):
        trunk, model = build(names, seed, frozen=frozen)
        cache = KVCache(64)
        if use and attached in ("whole", "both"):
            cache.attach(model, kind="activation")
        if use and attached != "whole":
            cache.attach(trunk, kind="activation")
        around = (lambda cache=cache: cache) if use else contextlib.nullcontext
        results.append(train(model, data, optimizer, around, evaluate=evaluate, in_graph=in_graph))
        cache.sites.entries.check_valid()
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
