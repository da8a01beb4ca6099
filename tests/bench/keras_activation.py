"""Keras: what the activation cache saves: a sentence encoder over repeating sentences, a head on a frozen CNN."""

from __future__ import annotations

import contextlib
import itertools
import time

import keras
import numpy as np
import tensorflow as tf
from activations import (
    AT_ONCE,
    BATCHES,
    BYPASS_TARGET,
    EPOCHS,
    PLAIN,
    REPEATED,
    TEXT_TARGET,
    TURNS,
    Sizes,
    all_rows,
    check_bypassed,
    weights_check,
)
from measure import Row, Table, alternate
from smol import checkpoint

import keras_encoder
import keras_images
import llama_keras
import sentences
from kvcache_keras import KVCache


def main(*, quick: bool = False) -> Table:
    """All cases, cached and not, by turns."""
    sizes = Sizes.of(quick=quick)
    count, pictures = sizes.sentences, sizes.pictures
    rows = all_rows(sizes, encoder, training, [bypass, look])
    text = [
        f"MiniLM over {count:,} real sentences of which {REPEATED:.0%} came before, in a graph; a new head on "
        f"a frozen CNN with `model.fit`, {EPOCHS} epochs over {pictures:,} pictures of MNIST, with the example's "
        "channels and with a quarter of them, a tenth of the work. Each run starts with an empty cache; results are "
        "compared.",
        'Then what a cache costs where it cannot help: a two-layer MLP with `bypass="auto"`, called eagerly, after its '
        "first hundred calls, and the look at SmolLM2's weights that each `with cache:` and each `generate` takes, "
        "against one decode step.",
    ]
    return Table("keras_activation", "Keras: activations kept per sample", text, rows)


def encoder(runs: int, count: int) -> Row:
    """Seconds for all sentences."""
    model, tokenizer = keras_encoder.load()
    texts = sentences.stream(count, REPEATED)
    graphs = {PLAIN: keras_encoder.graph(model)}
    keras_encoder.encode(graphs[PLAIN], tokenizer, texts[:64])
    cache = KVCache(memory="1GiB")
    cache.attach(model, kind="activation")
    with cache:
        graphs["ours"] = keras_encoder.graph(model)
        keras_encoder.encode(graphs["ours"], tokenizer, texts[:64])
    found: dict[str, np.ndarray] = {}

    def run(name: str) -> float:
        cache.clear()
        start = time.perf_counter()
        found[name] = keras_encoder.encode(graphs[name], tokenizer, texts)
        return time.perf_counter() - start

    samples = alternate({"ours": lambda: run("ours"), PLAIN: lambda: run(PLAIN)}, runs, "MiniLM", warm_up=0)
    np.testing.assert_allclose(found["ours"], found[PLAIN], rtol=0, atol=1e-5)
    return Row.of(f"MiniLM, {count:,} sentences", "s", samples, targets={PLAIN: TEXT_TARGET})


def training(runs: int, width: int, pictures: int, targets: dict[str, float]) -> Row:
    """Seconds for all epochs, without those of tracing."""
    trunk = keras_images.build_trunk(width)
    keras_images.fit(trunk, 5, keras_images.pictures(pictures, range(5)), 1)
    trunk.trainable = False
    data = keras_images.pictures(pictures)
    cache = KVCache(size=len(data[0]) + 1)
    losses: dict[str, list[float]] = {}

    def run(who: str) -> float:
        cache.clear()
        if who == "ours":
            cache.attach(trunk, kind="activation")
        losses[who], seconds = keras_images.fit(
            trunk, 10, data, EPOCHS, (lambda: cache) if who == "ours" else contextlib.nullcontext
        )
        if who == "ours":
            cache.detach()
        return seconds

    samples = alternate({"ours": lambda: run("ours"), PLAIN: lambda: run(PLAIN)}, runs, "frozen CNN", warm_up=0)
    np.testing.assert_allclose(losses["ours"], losses[PLAIN], rtol=1e-3, atol=1e-4)
    return Row.of(f"frozen CNN, {width} channels, new head, {EPOCHS} epochs", "s", samples, targets=targets)


def bypass(runs: int) -> Row:
    """Microseconds an eager call of a module that is cheaper than its cache."""

    def build() -> keras.Model:
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input((256,)), keras.layers.Dense(256, "relu"), keras.layers.Dense(10)])

    model, plain = build(), build()
    inputs = [tf.random.normal((32, 256)) for _ in range(BATCHES)]
    cache = KVCache(4096, bypass="auto")  # fewer samples than there are: none is there when it comes again
    cache.attach(model, kind="activation")
    with cache:
        for x in inputs[:100]:
            model(x)

    batches = itertools.cycle(inputs)

    def run(module: keras.Model) -> float:
        with cache:
            start = time.perf_counter()
            for x in itertools.islice(batches, AT_ONCE):
                module(x)
            return 1e6 * (time.perf_counter() - start) / AT_ONCE

    samples = alternate({"ours": lambda: run(model), PLAIN: lambda: run(plain)}, TURNS * runs, "two-layer MLP")
    check_bypassed(cache, (TURNS * runs + 1) * AT_ONCE)
    return Row.of("two-layer MLP, bypassed", "us", samples, targets={PLAIN: BYPASS_TARGET})


def look(runs: int) -> Row:
    """Milliseconds to notice whether SmolLM2's weights changed."""
    cache = KVCache(256)
    cache.attach(llama_keras.from_checkpoint(checkpoint()), outputs="last")
    return weights_check(runs, cache, lambda seq, steps: cache.decode_greedy([seq], [[1]], steps), 8)
