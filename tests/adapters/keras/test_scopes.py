"""What stands around a call inside ``with cache:``: other weights, a graph that XLA compiles, a question for shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from kvcache_core import KVCacheWarning, UsageError
from kvcache_keras import KVCache
from tests.adapters.keras.models import Small, as_new, functional, ids, tensor

STATELESS, XLA = "StatelessScope", "XLA compiles the graph"


def encoder() -> keras.Model:
    return keras.Sequential([keras.Input((6,)), layers.Dense(8, activation="relu"), layers.Dense(4)])


def samples() -> tf.Tensor:
    return tf.constant(np.random.default_rng(0).normal(size=(5, 6)), tf.float32)


def token_model() -> Small:
    model = Small()
    model(tensor([[1]]))
    return model


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Any], dict[str, str]]] = {
    "activation": (encoder, samples, {"kind": "activation"}),
    "tokens": (token_model, lambda: tensor(ids(2, 7)), {}),
    "tokens, last": (token_model, lambda: tensor(ids(2, 7)), {"outputs": "last"}),
}


@pytest.fixture(scope="module", params=MODELS)
def shared(request) -> Iterator[tuple[KVCache, Any, Any]]:
    make, inputs, options = MODELS[request.param]
    cache, model = KVCache(64, block_size=4), make()
    cache.attach(model, **options)
    yield cache, model, inputs()
    cache.detach()


@pytest.fixture
def attached(shared) -> tuple[KVCache, Any, Any]:
    """A cache as new, its model, inputs."""
    as_new(shared[0])
    return shared


def hits(cache: KVCache) -> int:
    return cache.stats().hit_entries + cache.stats().hit_tokens


def close(found: Any, expected: Any) -> None:
    expected = np.asarray(expected)
    if found.shape[1] == 1 != expected.shape[1]:
        expected = expected[:, -1:]
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5, atol=2e-6)


def reasons(cache: KVCache) -> str:
    return " ".join(cache.stats().bypass_reasons)


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.filterwarnings("ignore:.*StatelessScope:kvcache_core.KVCacheWarning")
def test_a_stateless_call_uses_the_weights_it_is_given(attached, in_graph: bool) -> None:
    cache, model, x = attached
    others = [0.1 * tf.random.stateless_normal(v.shape, (1, at)) for at, v in enumerate(model.trainable_variables)]
    fixed = [v.value for v in model.non_trainable_variables]

    def stateless(x: Any) -> Any:
        return model.stateless_call(others, fixed, x)[0]

    call, plain = (tf.function(stateless), tf.function(model.__call__)) if in_graph else (stateless, model)
    expected, own = stateless(x), model(x)
    with cache:
        for _ in range(2):
            close(plain(x), own)
            close(call(x), expected)
    assert STATELESS in reasons(cache)


def test_a_graph_that_xla_compiles_is_bypassed(attached) -> None:
    cache, model, x = attached
    expected = model(x)
    compiled, before = tf.function(model.__call__, jit_compile=True), hits(cache)
    with cache:
        with pytest.warns(KVCacheWarning, match=XLA):
            close(compiled(x), expected)
        close(compiled(x), expected)
        assert XLA in reasons(cache)
        close(model(x), expected)
        close(model(x), expected)
    assert hits(cache) > before


@pytest.mark.filterwarnings("ignore:.*vectorized_map:kvcache_core.KVCacheWarning")
def test_a_vectorized_map_computes_as_outside(attached) -> None:
    cache, model, x = attached
    expected = model(x)
    with cache:
        found = tf.vectorized_map(lambda one: model(one[None])[0], x)
    close(found, expected)
    assert "vectorized_map" in reasons(cache)


def test_fit_that_xla_compiles_trains_as_outside() -> None:
    """Compiled before the trunk was attached; the other way round Keras itself leaves XLA out."""
    x, y = samples(), tf.ones((5, 1))
    losses = []
    for use in (False, True):
        keras.utils.set_random_seed(3)
        trunk = encoder()
        trunk.trainable = False
        model = keras.Sequential([keras.Input((6,)), trunk, layers.Dense(1)])
        model.compile("sgd", "mse", jit_compile=True)
        if use:
            cache = KVCache(64)
            cache.attach(trunk, kind="activation")
            with cache, pytest.warns(KVCacheWarning, match=XLA):
                history = model.fit(x, y, epochs=3, verbose=0, shuffle=False)
        else:
            history = model.fit(x, y, epochs=3, verbose=0, shuffle=False)
        losses.append(history.history["loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_padding_in_a_graph_that_xla_compiles_is_refused() -> None:
    cache, model = KVCache(64, block_size=4), token_model()
    cache.attach(model)
    compiled = tf.function(lambda x, lengths: model(x, lengths=lengths), jit_compile=True, autograph=False)
    with pytest.raises(UsageError, match="jit_compile=False"):
        compiled(tensor(ids(2, 7)), tf.constant([7, 4]))
    cache.detach()


def test_a_question_for_shapes_is_no_call() -> None:
    cache, trunk = KVCache(64), encoder()
    cache.attach(trunk, kind="activation")
    with cache:
        start = keras.Input((6,))
        model = keras.Model(start, layers.Dense(2)(trunk(start)))
        assert not cache.stats().bypass_reasons and not cache.stats().miss_entries
        first, second = model(samples()), model(samples())
    close(second, first)
    assert cache.stats().hit_entries == 5
    cache.detach()


@pytest.mark.filterwarnings("ignore:.*exported:kvcache_core.KVCacheWarning")
@pytest.mark.parametrize("kind", ["activation", "tokens"])
def test_an_export_is_of_the_plain_model(tmp_path, kind: str) -> None:
    """It serves in another process, where there is no cache: no operation in it asks the host."""
    model, x = (encoder(), samples()) if kind == "activation" else (functional(blocks=1), tensor(ids(2, 7)))
    cache, expected = KVCache(64, block_size=4), model(x)
    cache.attach(model, **({"kind": kind} if kind == "activation" else {}))
    with cache:
        close(model(x), expected)
        model.export(tmp_path / "keras", verbose=False)
        tf.saved_model.save(model, tmp_path / "tensorflow")
    cache.detach()
    for name in ("keras", "tensorflow"):
        saved = tf.saved_model.load(tmp_path / name)
        serve = saved.signatures["serving_default"]
        close(next(iter(serve(x).values())), expected)
        operations = {node.op for node in serve.graph.as_graph_def().node}
        operations |= {node.op for f in serve.graph.as_graph_def().library.function for node in f.node_def}
        assert "PyFunc" not in operations
        assert "MatMul" in operations, "looked inside"
