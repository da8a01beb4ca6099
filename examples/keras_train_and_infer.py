"""`with cache:` around an ordinary Keras model, in training and in inference. Beside it: torch_train_and_infer.py.

Real data: scikit-learn's handwritten digits (1,797 pictures of 8 x 8). Training under the cache is the same training;
inference, in a `tf.function`, skips the pictures that were seen before, until the weights change.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from sklearn.datasets import load_digits

from kvcache_keras import KVCache


def build() -> keras.Model:
    keras.utils.set_random_seed(0)
    dense = [layers.Dense(256, "relu"), layers.Dense(256, "relu"), layers.Dense(10)]
    return keras.Sequential([keras.Input((64,)), *dense])


def train(model, cache, x, y, epochs):
    optimizer = keras.optimizers.Adam(1e-3)
    measure = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = measure(y, model(x, training=True))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    losses = []
    for _ in range(epochs):
        for at in range(0, len(x), 64):
            with cache:  # weights that are being trained are never served: the same loss, the same gradients
                losses.append(float(train_step(x[at : at + 64], y[at : at + 64])))
    return losses


def main(epochs: int = 3) -> None:
    data = load_digits()
    x, y = tf.constant(data.data / 16, tf.float32), tf.constant(data.target)
    cache = KVCache(size=len(x))
    model, plain = cache.attach(build()), build()

    losses = train(model, cache, x, y, epochs)
    nowhere = KVCache(size=1)
    nowhere.attach(layers.Identity())  # a cache that knows nothing of the plain model
    same = np.allclose(losses, train(plain, nowhere, x, y, epochs))
    print(f"trained {len(losses)} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}; equal without the cache: {same}")
    print(f"bypassed while training: {cache.stats().bypass_reasons}")

    infer = tf.function(model.__call__, input_signature=[tf.TensorSpec([None, 64])])
    with cache:
        first, second = infer(x), infer(x)  # one trace; what is cached is decided when it runs
    stats = cache.stats()
    accuracy = np.mean(np.argmax(second, 1) == data.target)
    print(f"accuracy {accuracy:.3f}; served {stats.hit_entries}, computed {stats.miss_entries}")
    print(f"equal without the cache: {np.allclose(second, plain(x), atol=1e-5) and np.array_equal(first, second)}")

    train(model, cache, x[:64], y[:64], 1)
    with cache:
        infer(x)
    print(f"after one more step nothing old is served: {cache.stats().hit_entries == stats.hit_entries}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    main(parser.parse_args().epochs)
