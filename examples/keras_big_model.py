"""Models whose weights do not fit: read from a file when a layer runs. Beside it: torch_big_model.py.

First SmolLM2 with memory for a third of its weights: the same tokens, and what had to be read for them. Then a
mixture of experts, tiny and random, with memory for some of its experts: the ones that are asked for stay.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

import llama_keras
from demo_prompts import QUESTIONS, SYSTEM
from kvcache_keras import KVCache, ParameterCache, empty_weights, generate
from smollm2 import Checkpoint, load_checkpoint

WIDTH, EXPERTS, PER_TOKEN = 64, 16, 2


def answer(model, prompt, new_tokens):
    """Greedy tokens, and the seconds; those for tracing are in both."""
    cache = KVCache(size=256)
    cache.attach(model)
    start = time.perf_counter()
    (tokens,) = generate(model, [prompt], max_new_tokens=new_tokens, cache=cache)
    seconds = time.perf_counter() - start
    cache.detach()
    return tokens, seconds


def language_model(folder: Path, checkpoint: Checkpoint, prompt: list[int], new_tokens: int, share: float) -> None:
    model = llama_keras.from_checkpoint(checkpoint)
    ParameterCache.save(model, folder / "model.safetensors")
    expected, plain_seconds = answer(model, prompt, new_tokens)
    total = nbytes(model)
    del model

    with empty_weights():  # nothing is allocated
        model = llama_keras.Llama(checkpoint.config)
    parameters = ParameterCache(folder / "model.safetensors", memory=int(share * total))
    parameters.attach(model)
    tokens, seconds = answer(model, prompt, new_tokens)

    stats = parameters.stats()
    print(f"{checkpoint.name}: {mib(total)} of weights, never more than {mib(stats.peak_bytes)} of them in memory")
    print(f"read {mib(stats.bytes_read)} for {new_tokens} tokens; the embedding, held by the model itself, once a step")
    print(f"{plain_seconds:.1f} s with all weights in memory, {seconds:.1f} s with {share:.0%}")
    print(f"tokens equal: {tokens == expected}")
    assert tokens == expected


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

    stats = parameters.stats()
    experts = sorted((stats.of(f"experts.{at}") for at in range(EXPERTS)), key=lambda one: -(one.hits + one.misses))
    hits, calls = (
        sum(one.hits for one in experts[: room // 2]),
        sum(one.hits + one.misses for one in experts[: room // 2]),
    )
    equal = all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    print(f"mixture: {EXPERTS} experts, memory for {room}; {steps} tokens, {PER_TOKEN} experts each")
    print(f"hit ratio {stats.of('experts').hit_ratio:.2f}, of the {room // 2} hottest experts {hits / calls:.2f}")
    print(f"read {mib(stats.bytes_read)}; outputs equal: {equal}")
    assert equal


def nbytes(layer) -> int:
    return sum(4 * int(np.prod(weight.shape)) for weight in {id(weight): weight for weight in layer.weights}.values())


def mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def main(new_tokens: int = 16, share: float = 1 / 3, checkpoint: Checkpoint | None = None, steps: int = 300) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint is None:
            checkpoint = load_checkpoint()
            prompt = checkpoint.chat(SYSTEM, QUESTIONS[0])
        else:
            prompt = list(range(1, 20))
        language_model(Path(folder), checkpoint, prompt, new_tokens, share)
        mixture(Path(folder), steps, room=8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--share", type=float, default=1 / 3, help="of the weights that memory is for")
    main(**vars(parser.parse_args()))
