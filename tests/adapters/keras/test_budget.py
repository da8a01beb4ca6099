"""One limit in bytes for an encoder's activations and a decoder's K/V in one cache, eager and in graphs."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import kvcache_keras
from kvcache_core import CacheFull
from kvcache_keras import generate
from tests.adapters.keras.models import Small, ids
from tests.adapters.two_kinds import ENTRY, TwoKinds


def prompt(seed: int, length: int) -> list[int]:
    return ids(1, length, seed=seed)[0].tolist()


def samples(seed: int, count: int = 4) -> tf.Tensor:
    return tf.constant(np.random.default_rng(seed).standard_normal((count, 16)), tf.float32)


def encoder() -> keras.Model:
    """A small encoder: [B, 16] -> [B, 8, 32], 1,024 bytes a sample."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [keras.Input((16,)), layers.Dense(32, "tanh"), layers.Dense(8 * 32), layers.Reshape((8, 32))]
    )
    model.trainable = False
    return model


@functools.cache
def models() -> tuple[keras.Model, keras.Model]:
    """The same for all tests: what they compute without a cache is traced once."""
    return encoder(), Small()


class Both(TwoKinds):
    """An encoder and a decoder over one cache of ``blocks`` blocks; each also in a graph traced once.

    The one made before loses its models.
    """

    last: Both | None = None

    def __init__(self, blocks: int = 64, *, outputs: str = "last") -> None:
        if Both.last is not None:
            Both.last.let_go()
        Both.last = self
        super().__init__(kvcache_keras, *models(), blocks, outputs)
        self.traces = {"encode": 0, "call": 0}
        self.encode_graph = tf.function(self._encode, input_signature=[tf.TensorSpec([None, 16])])
        self.call_graph = tf.function(self._call, input_signature=[tf.TensorSpec([None, None], tf.int32)])

    def let_go(self) -> None:
        for model in models():
            self.cache.detach(model)

    def _encode(self, x):
        self.traces["encode"] += 1
        return self.encoder(x)

    def _call(self, x):
        self.traces["call"] += 1
        return self.decoder(x)

    def encode(self, x, *, graph: bool = False) -> None:
        """Encode inside the cache; the answer is that of outside."""
        plain = self.encoder(x)
        with self.cache:
            found = self.encode_graph(x) if graph else self.encoder(x)
        np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)
        self.check()

    def call(self, row, *, graph: bool = False) -> None:
        """Call the decoder inside the cache."""
        x = tf.constant([row], tf.int32)
        plain = self.decoder(x)
        with self.cache:
            found = self.call_graph(x) if graph else self.decoder(x)
        np.testing.assert_allclose(found, plain, rtol=1e-4, atol=2e-5)
        self.check()

    def array_bytes(self) -> int:
        return sum(int(tf.size(array)) * array.dtype.size for array in self.cache.store._arrays.values())


def test_memory_moves_to_the_kind_that_is_in_use_and_nothing_is_traced_again():
    both = Both()
    for number in range(6):
        both.generate([prompt(number, 40)])
    assert (both.cache.core.num_blocks, both.cache.stats().memory_moves) == (64, 0)
    traces = dict(both.cache.runner.traces)
    for number in range(20):
        both.encode(samples(number, 8), graph=number % 2 == 1)
    assert both.cache.core.num_blocks <= 2 * 64 // 16
    misses = both.cache.stats().miss_entries
    both.encode(samples(19, 8), graph=True)
    assert both.cache.stats().miss_entries == misses, "the newest are kept"
    for number in range(6):
        both.generate([prompt(number, 40)])
    assert both.cache.core.num_blocks > 64 / 2
    assert 0 < both.cache.stats().memory_moves <= 2 * 16 + 2
    assert both.cache.runner.traces == traces
    assert both.traces["encode"] == 1


def test_the_encoder_first():
    both = Both()
    cache = both.begin_with_the_encoder()
    with cache:
        both.encoder(samples(0, 100))
    assert cache.stats().entry_bytes == both.memory // ENTRY * ENTRY, "all of it"
    cache.attach(both.decoder, kind="tokens", outputs="last")
    both.generate([prompt(0, 60)])
    both.generate([prompt(0, 60)])
    assert cache.stats().hit_tokens > 0
    both.encode(samples(1))


def test_what_fits_only_without_activations_is_served():
    both = Both()
    both.encode(samples(0, 60))
    assert both.cache.core.num_blocks < 50
    both.generate([prompt(0, 60), prompt(1, 60), prompt(2, 60)], count=4)
    with pytest.raises(CacheFull, match="the whole cache has 64"):
        generate(both.decoder, [[1] * 300], max_new_tokens=2, cache=both.cache)


def test_an_open_sequence_goes_on_while_memory_moves():
    both = Both()
    row = prompt(5, 60)
    plain = both.decoder(tf.constant([row]))[0].numpy()
    both.cache.warm([prompt(1, 80), prompt(2, 80)])
    seq = both.cache.open(row)
    both.cache.step([seq], [row[:20]])
    for at in range(20, 60):
        if at % 10 == 0:
            both.encode(samples(at, 16), graph=True)
        found = both.cache.step([seq], [row[at : at + 1]])[0]
        np.testing.assert_allclose(found, plain[at], rtol=1e-4, atol=2e-5)
    assert both.cache.stats().memory_moves > 0
    seq.close()


def test_a_resize_without_memory_changes_nothing():
    both = Both()
    row = prompt(5, 24)
    plain = both.decoder(tf.constant([row]))[0].numpy()

    def same(found, at):
        np.testing.assert_allclose(found, plain[at], rtol=1e-4, atol=2e-5)

    both.resize_without_memory(row, same, prompt, samples)


def test_memory_that_cannot_move_stays_where_it_is():
    Both().memory_cannot_move(prompt, samples)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["encode", "generate", "call"]), st.integers(0, 8), st.integers(1, 24), st.booleans()
        ),
        min_size=4,
        max_size=12,
    )
)
@settings(max_examples=3)
def test_any_order_of_uses(uses):
    both = Both(blocks=30, outputs="all")
    for what, seed, size, graph in uses:
        if what == "encode":
            both.encode(samples(seed, size), graph=graph)
        elif what == "generate":
            both.generate([prompt(seed, 2 * size)], count=2)
        else:
            both.call(prompt(seed, 2 * size), graph=graph)
    assert max(both.traces.values()) <= 1
