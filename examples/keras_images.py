"""A new head on a frozen CNN: features are computed once per picture, not once per epoch. Beside it: torch_images.py.

The CNN is trained here, on the digits 0 to 4 of real handwritten digits (MNIST); then its trunk is frozen and a new
head learns all ten, with `model.fit` and batches that are shuffled anew each epoch.
"""

import argparse
import contextlib
import os
import time

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import mnist
from kvcache_keras import KVCache


def build_trunk(width: int = 32) -> keras.Model:
    """Three stages of two convolutions, with `width` channels, then twice and four times as many."""
    keras.utils.set_random_seed(0)
    w = width
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            *(layers.Conv2D(w, 3, padding="same"), layers.BatchNormalization(), layers.ReLU()),
            *(layers.Conv2D(w, 3, padding="same", activation="relu"), layers.MaxPooling2D(2)),
            layers.Conv2D(2 * w, 3, padding="same", activation="relu"),
            *(layers.Conv2D(2 * w, 3, padding="same", activation="relu"), layers.MaxPooling2D(2)),
            layers.Conv2D(4 * w, 3, padding="same", activation="relu"),
            layers.Conv2D(4 * w, 3, padding="same", activation="relu"),
            *(layers.GlobalAveragePooling2D(), layers.Dense(64, activation="relu")),
        ],
        name="trunk",
    )


def pictures(count, keep=range(10)):
    x, y = mnist.load(count, keep)
    return x[..., None], y


def batches(x, y):
    options = tf.data.Options()
    options.autotune.enabled = False  # it can hold up the start of an epoch for longer than a cached epoch takes
    return tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=3).batch(64).with_options(options)


def fit(trunk, classes, data, epochs, around=contextlib.nullcontext):
    """Train a new head; the losses and the seconds, without those of tracing."""
    keras.utils.set_random_seed(2)
    model = keras.Sequential([keras.Input((28, 28, 1)), trunk, layers.Dense(classes)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = data
    with around():
        before = model.get_weights()
        some = 64 + len(x) % 64  # a full batch and one like the last
        model.fit(batches(np.zeros_like(x[:some]), y[:some]), shuffle=False, verbose=0)  # traces the graphs
        model.set_weights(before)
        model.optimizer.build(model.trainable_variables)
        for variable in model.optimizer.variables[2:]:
            variable.assign(np.zeros(variable.shape))
        start = time.perf_counter()
        history = model.fit(batches(x, y), epochs=epochs, shuffle=False, verbose=0)
    return history.history["loss"], time.perf_counter() - start


def main(count: int = 5000, pretrain_epochs: int = 3, epochs: int = 5) -> tuple[float, float]:
    trunk = build_trunk()
    fit(trunk, 5, pictures(count, range(5)), pretrain_epochs)
    trunk.trainable = False

    data = pictures(count)
    losses, plain_seconds = fit(trunk, 10, data, epochs)

    cache = KVCache(size=len(data[0]) + 1)
    cache.attach(trunk, kind="activation")  # before compile: XLA cannot ask what is cached
    cached_losses, seconds = fit(trunk, 10, data, epochs, lambda: cache)

    stats = cache.stats()
    same = np.allclose(losses, cached_losses, rtol=1e-3, atol=1e-4)
    ratio = seconds / plain_seconds
    print(f"{epochs} epochs: {plain_seconds:.2f} s without the cache, {seconds:.2f} s with it ({ratio:.2f})")
    print(f"features computed {stats.miss_entries}, served {stats.hit_entries}; losses equal: {same}")
    assert same
    return plain_seconds, seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000, help="pictures")
    parser.add_argument("--pretrain-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    main(**vars(parser.parse_args()))
