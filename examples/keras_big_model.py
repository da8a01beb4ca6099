"""Models whose weights do not fit: read from a file when a layer runs. Beside it: torch_big_model.py.

First SmolLM2 with memory for a third of its weights: the same tokens, and what had to be read for them. Then a
mixture of experts, tiny and random, with memory for some of its experts: the ones that are asked for stay.
"""

import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

import big_model_run
import llama_keras
from kvcache_keras import KVCache, ParameterCache, empty_weights, generate
from smollm2 import Checkpoint

WIDTH, EXPERTS, PER_TOKEN = 64, 16, 2


def language_model(folder: Path, checkpoint: Checkpoint, prompt: list[int], new_tokens: int, share: float) -> None:
    model = llama_keras.from_checkpoint(checkpoint)
    ParameterCache.save(model, folder / "model.safetensors")
    plain = big_model_run.answer(generate, model, KVCache(size=256), prompt, new_tokens)
    total = nbytes(model)
    del model

    with empty_weights():  # nothing is allocated
        model = llama_keras.Llama(checkpoint.config)
    parameters = ParameterCache(folder / "model.safetensors", memory=int(share * total))
    parameters.attach(model)
    found = big_model_run.answer(generate, model, KVCache(size=256), prompt, new_tokens)
    big_model_run.show_language_model(checkpoint.name, parameters.stats(), total, share, plain, found)


class Expert(layers.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = layers.Dense(4 * WIDTH, activation="relu"), layers.Dense(WIDTH)

    def build(self, shape):
        self.up.build(shape)
        self.down.build((None, 4 * WIDTH))

    def call(self, x):
        return self.down(self.up(x))


class Mixture(keras.Model):
    """Tokens [N, C] -> [N, C]: each goes through the experts that its router likes best, and some are popular."""

    def __init__(self) -> None:
        super().__init__()
        self.router = layers.Dense(EXPERTS)
        self.experts = [Expert() for _ in range(EXPERTS)]
        for layer in (self.router, *self.experts):
            layer.build((None, WIDTH))
        self.built = True

    def call(self, x):
        scores, chosen = ops.top_k(ops.softmax(self.router(x)), PER_TOKEN)
        result = tf.zeros_like(x)
        for expert in np.unique(chosen.numpy()):
            where = tf.where(chosen == expert)
            computed = tf.gather_nd(scores, where)[:, None] * self.experts[expert](tf.gather(x, where[:, 0]))
            result = tf.tensor_scatter_nd_add(result, where[:, :1], computed)
        return result


def mixture(folder: Path, steps: int, room: int) -> None:
    keras.utils.set_random_seed(0)
    model = Mixture()
    model.router.bias.assign(-1.5 * np.log(np.arange(1, EXPERTS + 1)))  # what popularity looks like in practice
    ParameterCache.save(model, folder / "mixture.safetensors")
    inputs = np.random.default_rng(0).normal(size=(steps, 1, WIDTH)).astype("float32")
    expected = [model(x) for x in inputs]

    each = nbytes(model.experts[0])
    parameters = ParameterCache(folder / "mixture.safetensors", memory=room * each + nbytes(model.router))
    parameters.attach(model)
    found = [model(x) for x in inputs]

    equal = all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    big_model_run.show_mixture(parameters.stats(), EXPERTS, PER_TOKEN, room, steps, equal=equal)


def nbytes(layer) -> int:
    return sum(4 * int(np.prod(weight.shape)) for weight in {id(weight): weight for weight in layer.weights}.values())


def main(**options) -> None:
    big_model_run.run(language_model, mixture, **options)


if __name__ == "__main__":
    main(**big_model_run.wanted(__doc__))
