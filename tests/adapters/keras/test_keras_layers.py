"""Models of Keras's own attention layers, served as they are."""

from __future__ import annotations

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from kvcache_core import InvalidInput, KVCacheWarning
from kvcache_core.testing import assert_cached_equals_recompute
from kvcache_keras import KVCache, PositionIds, generate
from tests.supported import claimed, proven

VOCAB = 37


def embed(ids, positions=True, **options):
    """Tokens and, learned for each position, where they are."""
    h = layers.Embedding(VOCAB, 16, embeddings_initializer=noise(), **options)(ids)
    return h + layers.Embedding(48, 16, embeddings_initializer=noise())(PositionIds()(ids)) if positions else h


def noise(seed=0):
    return keras.initializers.RandomNormal(stddev=0.5, seed=seed)


def multi_head(**options):
    return layers.MultiHeadAttention(2, 8, kernel_initializer=noise(1), **options)


def functional(attend, blocks=2):
    """Blocks around ``attend(h)``."""
    ids = keras.Input((None,), dtype="int32")
    h = embed(ids)
    for _ in range(blocks):
        h = h + attend(layers.LayerNormalization()(h))
        h = h + layers.Dense(16, activation="gelu", kernel_initializer=noise(2))(h)
    return keras.Model(ids, layers.Dense(VOCAB, kernel_initializer=noise(3))(h))


KINDS = {
    "multi-head": lambda h: multi_head()(h, h, use_causal_mask=True),
    "multi-head, window": lambda h: multi_head(sliding_window=4)(h, h, use_causal_mask=True),
    "multi-head, gated": lambda h: multi_head(use_gate=True, value_dim=4)(h, h, use_causal_mask=True),
    "grouped-query": lambda h: layers.GroupQueryAttention(8, 4, 2, kernel_initializer=noise(1))(
        h, h, use_causal_mask=True
    ),
    "grouped-query, window": lambda h: layers.GroupQueryAttention(
        8, 4, 2, sliding_window=4, use_gate=True, kernel_initializer=noise(1)
    )(h, h, use_causal_mask=True),
}


@keras.saving.register_keras_serializable(package="tests")
class Block(layers.Layer):
    """A subclassed block."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = layers.LayerNormalization()
        self.attention = multi_head()

    def build(self, shape):
        self.norm.build(shape)
        self.attention.build(shape, shape)

    def call(self, h):
        x = self.norm(h)
        return h + self.attention(x, x, use_causal_mask=True)


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    """A subclassed model."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.tokens = layers.Embedding(VOCAB, 16, embeddings_initializer=noise())
        self.where = layers.Embedding(48, 16, embeddings_initializer=noise(1))
        self.positions = PositionIds()
        self.parts = [Block(), Block()]
        self.out = layers.Dense(VOCAB, kernel_initializer=noise(2))

    def call(self, ids):
        h = self.tokens(ids) + self.where(self.positions(ids))
        for part in self.parts:
            h = part(h)
        return self.out(h)


def sequential():
    model = keras.Sequential([keras.Input((None,), dtype="int32")])
    model.add(layers.Embedding(VOCAB, 16, embeddings_initializer=noise()))
    model.add(Block())
    model.add(Block())
    model.add(layers.Dense(VOCAB, kernel_initializer=noise(2)))
    return model


# Two blocks show that layers are told apart, which does not depend on their windows.
MODELS = {name: lambda kind=kind, n=1 if "window" in name else 2: functional(kind, n) for name, kind in KINDS.items()}
MODELS |= {"subclassed": Subclassed, "sequential": sequential}


def close(found, expected):
    """Within 32 units in the last place of the largest output, as the testing kit allows."""
    allowed = 32 * np.finfo(np.float32).eps * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=allowed)


TABLE = "Keras: its own attention layers"
MODES = {"forward", "stepwise", "small pool", "graph"}
IN_EVERY_RUN = ("multi-head, window", "grouped-query", "subclassed")


def test_the_table_claims_what_is_tested_here_and_no_more():
    assert claimed(TABLE) == {(name, mode) for name in MODELS for mode in MODES}


@pytest.mark.parametrize(
    "name", [name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_cached_equals_recompute(name):
    report = assert_cached_equals_recompute(
        MODELS[name](), KVCache(size=48, block_size=4), max_length=16, max_new_tokens=3, rounds=1
    )
    assert report.reused_tokens > 0
    proven(TABLE, name, "forward")
    proven(TABLE, name, "stepwise")


@pytest.mark.parametrize(
    "name", ["sequential", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "sequential")]
)
def test_in_a_graph_of_the_users_own(name):
    model, cache = MODELS[name](), KVCache(size=48, block_size=4)
    x = tf.constant(np.random.default_rng(0).integers(1, VOCAB, (2, 11)), tf.int32)
    expected = model(x)
    cache.attach(model)
    with cache:
        graph = tf.function(model)
        first, second = graph(x), graph(x)
    close(first, expected)
    close(second, expected)
    assert cache.stats().hit_tokens >= 20
    proven(TABLE, name, "graph")


@pytest.mark.parametrize(
    "name",
    ["grouped-query", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "grouped-query")],
)
def test_small_pool(name):
    model, cache = MODELS[name](), KVCache(size=10, block_size=4)
    cache.attach(model)
    for seed in range(4):
        prompts = np.random.default_rng(seed).integers(1, VOCAB, (2, 11)).tolist()
        found = generate(model, prompts, max_new_tokens=5, cache=cache)
        assert found == generate(model, prompts, max_new_tokens=5)
    assert cache.stats().evicted_blocks > 0
    cache.core.check_valid()
    proven(TABLE, name, "small pool")


def test_a_saved_attached_model_is_the_plain_one(tmp_path):
    model, cache = functional(KINDS["grouped-query"]), KVCache(size=16)
    x = tf.constant([[5, 7, 9, 2]])
    expected = model(x)
    model.save(tmp_path / "plain.keras")
    plain = model.to_json()
    cache.attach(model)
    with cache:
        model(x)
        model.save(tmp_path / "attached.keras")
    assert model.to_json() == plain
    for name in ("plain", "attached"):
        loaded = keras.models.load_model(tmp_path / f"{name}.keras")
        assert not any("call" in vars(layer) for layer in loaded._flatten_layers())
        np.testing.assert_array_equal(loaded(x), expected)
    cache.detach()
    assert not any("call" in vars(layer) for layer in model._flatten_layers())


def test_hub_layers_take_their_positions_from_the_cache():
    ids = keras.Input((None,), dtype="int32")
    h = keras_hub.layers.TokenAndPositionEmbedding(VOCAB, 48, 16, embeddings_initializer=noise())(ids)
    h = h + keras_hub.layers.SinePositionEncoding()(h)
    h = keras_hub.layers.TransformerDecoder(24, 2, kernel_initializer=noise(1))(h)
    model = keras.Model(ids, layers.Dense(VOCAB, kernel_initializer=noise(2))(h))
    assert_cached_equals_recompute(model, KVCache(size=48, block_size=4), max_length=16, max_new_tokens=3, rounds=1)


# ---- what cannot be served exactly is refused, by name -------------------------------------------------


def refused(attend, match):
    model, cache = functional(attend, blocks=1), KVCache(size=16)
    with pytest.raises(InvalidInput, match=match):
        generate(cache.attach(model), [[1, 2, 3]], max_new_tokens=2, cache=cache)


def test_without_a_causal_mask():
    refused(lambda h: multi_head(name="seer")(h, h), "(?s)seer.*use_causal_mask=True")


def test_cross_attention():
    refused(
        lambda h: multi_head(name="crossing")(h, layers.Dense(16)(h), use_causal_mask=True),
        "(?s)crossing.*cross-attention",
    )


def test_hub_decoder_without_a_causal_mask():
    refused(
        lambda h: keras_hub.layers.TransformerDecoder(24, 2)(h, use_causal_mask=False),
        "self_attention.*computed in parts",
    )


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("convolution", lambda: layers.Conv1D(16, 3, padding="causal", name="convolution")),
        ("recurrent", lambda: layers.GRU(16, return_sequences=True, name="recurrent")),
    ],
)
def test_layers_that_mix_tokens(name, layer):
    refused(lambda h: KINDS["multi-head"](layer()(h)), f"{name}.*computed in parts")


class CountsFromZero(layers.Layer):
    """Positions of its own."""

    def call(self, h):
        return h + keras.ops.cast(keras.ops.arange(keras.ops.shape(h)[1]), h.dtype)[None, :, None]

    def compute_output_spec(self, h):
        return keras.KerasTensor(h.shape, h.dtype)


def test_positions_of_its_own():
    refused(lambda h: KINDS["multi-head"](CountsFromZero(name="counter")(h)), r"counter.*positions\(\)")


def test_a_subclass_that_computes_something_else_is_not_taken_for_its_base():
    class Louder(layers.MultiHeadAttention):
        def _compute_attention(self, *args, **kwargs):
            output, scores = super()._compute_attention(*args, **kwargs)
            return output * 2, scores

    refused(lambda h: Louder(2, 8)(h, h, use_causal_mask=True), "no call of kvcache_keras.attention")


# ---- mask_zero -----------------------------------------------------------------------------------------


@pytest.fixture
def masking():
    ids = keras.Input((None,), dtype="int32")
    h = embed(ids, positions=False, mask_zero=True)
    h = multi_head()(h, h, use_causal_mask=True)
    return keras.Model(ids, layers.Dense(VOCAB, kernel_initializer=noise(3))(h))


def test_token_zero_of_a_model_that_masks_it_is_computed_as_outside(masking):
    cache = KVCache(size=32, block_size=4)
    cache.attach(masking)
    x = tf.constant([[5, 6, 7, 8, 9, 3], [0, 0, 4, 5, 6, 7]])
    expected = masking(x)
    with cache:
        np.testing.assert_allclose(masking(x[:1]), expected[:1], rtol=1e-5, atol=1e-6)
        with pytest.warns(KVCacheWarning, match="mask_zero"):
            np.testing.assert_array_equal(masking(x), expected)
        graph = tf.function(masking)
        np.testing.assert_allclose(graph(x), expected, rtol=1e-5, atol=1e-6)
    assert cache.stats().bypassed_calls == 2
    with pytest.raises(InvalidInput, match="token 0 is padding"):
        cache.open([4, 0, 3])
