"""attention outside a cache, and the layers."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from kvcache_core import InvalidInput
from kvcache_core.attention import attend
from kvcache_keras import (
    CachedAttention,
    KVCache,
    PositionIds,
    _backend,
    attention,
    generate,
    positions,
    select_outputs,
)
from kvcache_keras.kernels import _CHUNK, Scoring, plain_attention
from tests.adapters.keras.models import Small, functional, ids, in_graph, tensor


def heads(batch: int, length: int, *shapes: tuple[int, int], dtype: str = "float64") -> list[tf.Tensor]:
    random = np.random.default_rng(0)
    return [tf.constant(random.standard_normal((batch, length, *shape)), dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("window", "scale", "softcap"), [(None, None, None), (3, None, None), (None, 0.2, None), (4, None, 2.0)]
)
def test_equals_the_reference(window, scale, softcap) -> None:
    q, k, v = heads(2, 9, (6, 8), (2, 8), (2, 5))
    y = attention(q, k, v, window=window, scale=scale, softcap=softcap)
    assert y.shape == (2, 9, 6, 5)
    where = np.arange(9)
    for row in range(2):
        rows = [one[row].numpy().swapaxes(0, 1) for one in (q, k, v)]
        expected = attend(*rows, where, where, window=window, scale=scale, softcap=softcap)
        np.testing.assert_allclose(y[row].numpy().swapaxes(0, 1), expected, rtol=1e-12)


def test_gradients_equal_plain_attention() -> None:
    # A head size whose scale float32 holds exactly: Keras rounds it to that.
    q, k, v = heads(2, 9, (4, 16), (2, 16), (2, 16))

    def gradients(function) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch((q, k, v))
            loss = tf.reduce_sum(function() ** 2)
        return tape.gradient(loss, (q, k, v))

    found = gradients(lambda: attention(q, k, v, layer=0))
    expected = gradients(lambda: keras.ops.dot_product_attention(q, k, v, is_causal=True))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [None, 100])
def test_chunks_change_nothing(window: int | None) -> None:
    q, k, v = heads(2, 2 * _CHUNK + 7, (4, 8), (2, 8), (2, 6))
    whole = plain_attention(q, k, v, Scoring(window))
    np.testing.assert_allclose(plain_attention(q, k, v, Scoring(window), in_chunks=True), whole, rtol=1e-10)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str) -> None:
    q, k, v = heads(1, 9, (4, 8), (2, 8), (2, 8), dtype=dtype)
    y = attention(q, k, v)
    assert y.dtype == dtype
    wide = attention(*(tf.cast(one, "float64") for one in (q, k, v)))
    np.testing.assert_allclose(tf.cast(y, "float64"), wide, atol=0.03)


def test_positions_and_select_outputs_outside() -> None:
    assert positions(4).numpy().tolist() == [[0, 1, 2, 3]]
    assert positions(tf.constant(2)).numpy().tolist() == [[0, 1]]
    hidden = tf.zeros((2, 3, 4))
    assert select_outputs(hidden) is hidden


def test_wrong_shapes() -> None:
    q, k, v = heads(1, 3, (4, 8), (3, 8), (3, 8))
    with pytest.raises(InvalidInput, match="multiple"):
        attention(q, k, v)
    with pytest.raises(InvalidInput, match=r"\[B, T, H, D\]"):
        attention(q[0], k, v)


# ---- CachedAttention -----------------------------------------------------------------------------


def test_a_saved_model_loads_and_uses_the_cache(tmp_path: Path) -> None:
    model = functional(window=5)
    x = tensor(ids(2, 11))
    expected = model(x)
    cache = KVCache(size=64, block_size=4)
    cache.attach(model)
    with cache:
        model(x)
        model.save(tmp_path / "model.keras")  # while it is attached
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert np.array_equal(loaded(x), expected)
    other = KVCache(size=64, block_size=4)
    other.attach(loaded)
    with other:
        for _ in range(2):
            np.testing.assert_allclose(loaded(x), expected, rtol=1e-5, atol=1e-6)
    assert other.stats().hit_tokens == 20
    prompt = ids(7).tolist()
    plain = generate(model, [prompt], max_new_tokens=5)
    assert generate(loaded, [prompt], max_new_tokens=5, cache=other) == plain
    cache.detach()


def test_the_layer_keeps_its_settings() -> None:
    layer = CachedAttention(
        4, 8, num_kv_heads=2, value_dim=6, window=7, softcap=2.0, use_bias=True, rope_theta=10.0, layer=3
    )
    config = layer.get_config()
    assert CachedAttention.from_config(config).get_config() == config
    assert layer(tf.zeros((2, 5, 12))).shape == (2, 5, 12)
    assert len(layer.weights) == 8
    for wrong in ({"num_kv_heads": 3}, {"value_dim": 0}, {"rope_theta": 10.0, "head_dim": 5}):
        with pytest.raises(InvalidInput):
            CachedAttention(**{"num_heads": 4, "head_dim": 8, **wrong})


def test_the_layer_trains() -> None:
    keras.utils.set_random_seed(1)
    tokens = keras.Input((None,), dtype="int32")
    h = keras.layers.Embedding(9, 16)(tokens) + keras.layers.Embedding(32, 16)(PositionIds()(tokens))
    h = h + CachedAttention(2, 8)(h)
    model = keras.Model(tokens, keras.layers.Dense(9)(h))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss, jit_compile=False)
    x = ids(16, 8, vocab=9).astype("int32")
    first = model.evaluate(x, x, verbose=0)
    model.fit(x, x, epochs=8, verbose=0)
    assert model.evaluate(x, x, verbose=0) < first / 2


# ---- the rest ------------------------------------------------------------------------------------


def test_threads_share_one_cache() -> None:
    model = Small()
    cache = KVCache(size=400, block_size=4)
    cache.attach(model)
    shared = ids(9).tolist()
    prompts = [shared + ids(4, seed=number).tolist() for number in range(8)]
    expected = [generate(model, [prompt], max_new_tokens=4)[0] for prompt in prompts]
    x = tensor(prompts)
    full = model(x).numpy()
    run = in_graph(model, input_signature=[tf.TensorSpec([None, None], tf.int32)])
    with cache:
        run(x[:1])
    found: dict[int, list[bool]] = {}

    def work(number: int) -> None:
        rows = x[number : number + 1]
        found[number] = []
        for _ in range(2):
            found[number].append(
                generate(model, [prompts[number]], max_new_tokens=4, cache=cache) == [expected[number]]
            )
            with cache:
                found[number].append(np.allclose(model(rows), full[number], atol=1e-5))
                found[number].append(np.allclose(run(rows), full[number], atol=1e-5))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [True] * 6 for number in range(8)}
    cache.core.check_valid()
    assert cache.stats().live_blocks == 0
    assert set(cache.runner.traces.values()) == {1}


def test_another_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ImportError, match=r"runs on 'jax'; set the environment variable KERAS_BACKEND=tensorflow"):
        importlib.reload(_backend)
    monkeypatch.undo()
    importlib.reload(_backend)


def test_lossy_storage_says_so() -> None:
    model = Small()
    cache = KVCache(size=32, block_size=4, dtype="bfloat16")
    cache.attach(model)
    x = tensor(ids(2, 9))
    expected = model(x)
    with cache:
        model(x)
        y = model(x)
    assert not cache.exact
    np.testing.assert_allclose(y, expected, atol=0.02)
    assert cache.store.array(0, "k").dtype == tf.bfloat16
