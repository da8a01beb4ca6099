"""Models and helpers for the tests of kvcache_keras."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kvcache_keras import CachedAttention, KVCache, PositionIds, attention, causal_conv1d, positions, select_outputs
from tests.reference_decoder import DecoderConfig, InjectedFault, Weights, forward

VOCAB = 50


class KerasOps:
    """What the reference decoder needs of a framework."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def take(self, table: Any, ids: Any) -> Any:
        return tf.gather(table, ids)

    def norm(self, x: Any) -> Any:
        mean = tf.reduce_mean(x * x, axis=-1, keepdims=True)
        return x / tf.sqrt(mean + tf.constant(1e-6, x.dtype))

    def silu(self, x: Any) -> Any:
        return x / (1 + tf.exp(-x))

    def rotary(self, where: Any, size: int) -> tuple[Any, Any]:
        wide = "float64" if self.dtype == "float64" else "float32"
        powers = tf.range(0, size, 2, dtype=tf.int32)
        frequencies = tf.exp(tf.cast(powers, wide) * tf.cast(-np.log(100.0) / size, wide))
        angles = tf.cast(where, wide)[:, :, None, None] * frequencies
        return tf.cast(tf.cos(angles), self.dtype), tf.cast(tf.sin(angles), self.dtype)

    def split_heads(self, x: Any, heads: int) -> Any:
        batch, length = tf.unstack(tf.shape(x)[:2])
        return tf.reshape(x, (batch, length, heads, x.shape[-1] // heads))

    def merge_heads(self, x: Any) -> Any:
        batch, length = tf.unstack(tf.shape(x)[:2])
        return tf.reshape(x, (batch, length, x.shape[2] * x.shape[3]))

    def concat(self, parts: list[Any]) -> Any:
        return tf.concat(parts, axis=-1)


class Decoder(keras.Model):
    """The reference decoder as a Keras model."""

    def __init__(self, config: DecoderConfig, weights: Weights) -> None:
        super().__init__(dtype=config.dtype)
        self.config = config
        self.named = {
            name: self.add_weight(
                shape=value.shape, name=name.replace(".", "_"), initializer="zeros", dtype=config.dtype
            )
            for name, value in weights.items()
        }
        for name, value in weights.items():
            self.named[name].assign(value)
        self.fail: int | None = None
        self.built = True

    def call(self, x: Any) -> Any:
        weights = {name: tf.convert_to_tensor(variable) for name, variable in self.named.items()}
        ops = KerasOps(self.config.dtype)
        return forward(ops, self.config, weights, x, positions(tf.shape(x)[1]), self.attend, self.convolve)

    def convolve(self, layer: int, x: Any, weight: Any, dilation: int) -> Any:
        return causal_conv1d(x, weight, layer=layer, dilation=dilation)

    def attend(self, layer: int, q: Any, k: Any, v: Any) -> Any:
        config = self.config
        y = attention(q, k, v, layer=layer, window=config.windows[layer], scale=config.scale, softcap=config.softcap)
        if layer == self.fail:
            raise InjectedFault(layer)
        return y


class KerasBackend:
    """The reference driver's view of a Keras model and its cache."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: Weights,
        num_blocks: int,
        *,
        stored: str | None = None,
        cache: KVCache | None = None,
    ) -> None:
        self.model = Decoder(config, weights)
        self.cache = cache or KVCache(size=num_blocks, block_size=config.block_size, dtype=stored)
        self.cache.attach(self.model, outputs="last")
        self.core = self.cache.core
        fill_with_nan(self.cache.store)

    def step(self, seqs: Any, token_lists: Any, fail: int | None = None) -> np.ndarray:
        eager = tf.config.functions_run_eagerly()
        self.model.fail = fail if eager else None
        try:
            with self.cache.transaction(seqs, token_lists) as plan:
                logits = self.cache._run_step(plan)
                if fail is not None:
                    raise InjectedFault(fail)
                return logits
        finally:
            self.model.fail = None

    def uncached(self, tokens: list[int]) -> np.ndarray:
        logits = self.model(tf.constant([tokens]))[0]
        return tf.cast(logits, tf.float32).numpy() if logits.dtype == tf.bfloat16 else logits.numpy()

    def resize(self, num_blocks: int) -> None:
        self.cache.resize(num_blocks)


def fill_with_nan(store: Any) -> None:
    """Whoever lets a slot matter that nothing was written to gets NaN; the null block stays as it is made."""
    for key, spec in store._specs.items():
        array = store.array(*key)
        shape = (spec.heads, store.stride, *array.shape[1:])
        values = np.full(shape, 127 if array.dtype.is_integer else np.nan, np.float32)
        values[:, 0] = 0
        array.assign(tf.cast(values.reshape(-1, *shape[2:]), array.dtype))


def as_new(cache: KVCache) -> KVCache:
    """A cache that tests share, as if it had just been made, but for the graphs that it has: tracing them takes long.

    What is stored is NaN: a test that met another one's K and V would see it.
    """
    cache.clear()
    if cache._core is not None:
        fill_with_nan(cache.store)
        cache.core._hit_tokens = cache.core._miss_tokens = 0
    cache._bypassed_calls = cache._bypassed_tokens = 0
    cache._bypass_reasons.clear()
    cache._warned.clear()
    return cache


class Small(keras.Model):
    """A small subclassed decoder: a grouped-query layer and, of two, one with a window; learned positions."""

    def __init__(self, vocab: int = VOCAB, window: int | None = 5, layers: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vocab, self.window = vocab, window
        self.embed = keras.layers.Embedding(vocab, 16)
        self.learned = keras.layers.Embedding(96, 16)
        self.projections = [keras.layers.Dense(8 * (4 + 2 + 2)) for _ in range(layers)]
        self.outs = [keras.layers.Dense(16) for _ in range(layers)]
        self.dropout = keras.layers.Dropout(0.5)
        self.head = keras.layers.Dense(vocab)

    def call(self, x: Any, training: bool = False) -> Any:
        batch, length = tf.unstack(tf.shape(x))
        h = self.embed(x) + self.learned(positions(length))
        h = tf.reshape(h, (-1, 16))  # a product of matrices is traced much faster than one over three axes
        for layer, (projection, out) in enumerate(zip(self.projections, self.outs, strict=True)):
            q, k, v = tf.split(tf.reshape(projection(h), (batch, length, 8, 8)), (4, 2, 2), axis=2)
            y = attention(q, k, v, layer=layer, window=(None, self.window)[layer])
            h = h + out(tf.reshape(y, (-1, 32)))
        h = self.dropout(h, training=training)
        return self.head(select_outputs(tf.reshape(h, (batch, length, 16))))


def functional(vocab: int = VOCAB, window: int | None = None, blocks: int = 2) -> keras.Model:
    """A functional decoder with rotary and learned positions."""
    ids = keras.Input((None,), dtype="int32")
    h = keras.layers.Embedding(vocab, 16)(ids) + keras.layers.Embedding(96, 16)(PositionIds()(ids))
    for _ in range(blocks):
        h = h + CachedAttention(4, 8, num_kv_heads=2, value_dim=6, window=window, rope_theta=100.0)(h)
    return keras.Model(ids, keras.layers.Dense(vocab)(h))


def sequential(vocab: int = VOCAB) -> keras.Model:
    """A sequential decoder."""
    return keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(vocab, 16),
            CachedAttention(2, 8, use_bias=True, softcap=3.0, rope_theta=100.0),
            keras.layers.Dense(vocab),
        ]
    )


def ids(*shape: int, seed: int = 0, vocab: int = VOCAB) -> np.ndarray:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, vocab, shape)


def greedy(model: Any, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The most likely tokens by whole calls of the model, eager: no graph is traced for them."""
    rows = [list(prompt) for prompt in prompts]
    for row in rows:
        for _ in range(count):
            row.append(int(np.argmax(model(tensor([row]))[0, -1])))
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def tensor(values: Any) -> tf.Tensor:
    return tf.constant(values, tf.int32)


def in_graph(model: Any, **options: Any) -> Any:
    """The model in a ``tf.function`` of a user's own."""

    def run(x: Any) -> Any:
        return model(x)

    return tf.function(run, **options)
