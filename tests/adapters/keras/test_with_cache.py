"""``with cache: y = model(x)``: the values and the shape that the model gives outside."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import keras
import numpy as np
import pytest
import tensorflow as tf

from kvcache_core import InvalidInput, InvalidType, KVCacheWarning, UsageError
from kvcache_keras import KVCache, attention, generate, positions
from tests.adapters.keras.models import VOCAB, Small, as_new, functional, ids, in_graph, sequential, tensor


def close(found, expected) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-5, atol=2e-6)


def small() -> Small:
    model = Small()
    model(tensor([[1]]))
    return model


@pytest.fixture(scope="module")
def model() -> Small:
    """Attached to the cache that tests share."""
    return small()


@pytest.fixture(scope="module")
def plain() -> Small:
    """Attached to nothing."""
    return small()


@contextmanager
def attached(model, outputs: str = "all") -> Iterator[KVCache]:
    cache = KVCache(size=64, block_size=4)
    cache.attach(model, outputs=outputs)
    try:
        yield cache
        cache.core.check_valid()
        assert cache.stats().live_blocks == 0
    finally:
        if cache.model is not None:
            cache.detach()


@pytest.fixture(scope="module")
def shared(model: Small) -> Iterator[KVCache]:
    with attached(model) as cache:
        yield cache


@pytest.fixture
def cache(shared: KVCache) -> Iterator[KVCache]:
    """As new, with the graphs that were traced before."""
    yield as_new(shared)
    shared.core.check_valid()
    assert shared.stats().live_blocks == 0


@pytest.mark.parametrize("make", [Small, functional, sequential])
def test_full_output_from_cached_and_new(make) -> None:
    model = make()
    x = tensor(ids(3, 13))
    expected = model(x)
    cache = KVCache(size=64, block_size=4)
    assert cache.attach(model) is model
    with cache:
        for _ in range(3):
            close(model(x), expected)
        close(model(x[:, :7]), expected[:, :7])
        close(model(x[1:2]), expected[1:2])
    assert cache.stats().hit_tokens >= 2 * 3 * 12
    assert cache.runner.traces == {"outputs": 1}
    assert cache.detach() is model
    close(model(x), expected)


def test_integer_ids_of_any_type(model: Small, cache: KVCache) -> None:
    for seed, dtype in enumerate(("int32", "int64", "uint8")):
        x = ids(2, 6, seed=seed)
        with cache:
            close(model(tf.constant(x, dtype)), model.call.original(tensor(x)))


def test_ragged_rows(model: Small, cache: KVCache) -> None:
    x, lengths = ids(3, 13), [13, 5, 9]
    plain = model(tensor(x)).numpy()
    right = np.arange(13) < np.array(lengths)[:, None]
    expected = np.where(right[:, :, None], plain, 0)
    left = np.zeros_like(x)
    for row, length in enumerate(lengths):
        left[row, 13 - length :] = x[row, :length]
    left_mask = right[:, ::-1]
    with cache:
        for _ in range(2):
            close(model(tensor(x), lengths=lengths), expected)
            close(model(tensor(x), mask=tf.constant(right)), expected)
            y = model(tensor(left), attention_mask=tensor(left_mask))
            for row, length in enumerate(lengths):
                close(y[row, 13 - length :], plain[row, :length])
                assert not np.any(y[row, : 13 - length])
    # Lengths mean the same outside.
    close(model(tensor(x), lengths=lengths), expected)
    close(model(tensor(left), attention_mask=tensor(left_mask))[1, 8:], plain[1, :5])


def test_outputs_last(plain: Small) -> None:
    """In a graph of the user's, and eagerly by the cache's graph that was traced for it."""
    x, run = tensor(ids(3, 13)), in_graph(plain)
    whole = plain(x).numpy()
    with attached(plain, "last") as cache, cache:
        for _ in range(2):
            close(run(x), whole[:, -1:])
        for _ in range(2):
            close(plain(x), whole[:, -1:])
        close(plain(x, lengths=[13, 5, 9]), np.stack([whole[0, 12:13], whole[1, 4:5], whole[2, 8:9]]))
        with pytest.warns(KVCacheWarning, match="room"):
            y = plain(tensor(ids(9, 60)))
        assert y.shape == (9, 1, VOCAB)
        assert all(spec.kind == "attention" for spec in cache.store.layout.layers)


def test_no_room_is_computed_as_outside(model: Small, cache: KVCache) -> None:
    x = tensor(ids(9, 60))
    expected = model(x)
    with cache:
        with pytest.warns(KVCacheWarning, match="no room"):
            close(model(x), expected)
        close(model(x), expected)  # warned of once
    assert cache.stats().bypassed_calls == 2
    assert cache.stats().bypassed_tokens == 2 * 9 * 60


def test_generated_tokens_are_found(model: Small, cache: KVCache) -> None:
    prompt = ids(9).tolist()
    with cache:
        [new] = generate(model, [prompt], max_new_tokens=6)
    x = tensor([prompt + new])
    expected = model(x)
    with cache:
        close(model(x), expected)
        before = cache.stats().hit_tokens
        close(model(x), expected)
    assert cache.stats().hit_tokens - before == 14


# ---- in a user's graph --------------------------------------------------------------------------


def test_in_a_users_graph_with_one_trace(model: Small, cache: KVCache) -> None:
    traces = []

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32)])
    def run(x):
        traces.append(1)
        y = model(x)
        assert y.shape == (None, None, VOCAB)
        return y

    x = tensor(ids(4, 13))
    expected = model(x)
    with cache:
        for rows, length in ((4, 13), (1, 13), (3, 5), (2, 1), (4, 12), (4, 13)):
            close(run(x[:rows, :length]), expected[:rows, :length])
    assert len(traces) == 1
    assert cache.stats().hit_tokens > 60
    assert cache.stats().live_blocks == 0


def test_the_block_itself_in_a_graph(plain: Small) -> None:
    x = tensor(ids(2, 9))
    expected = plain(x)
    with attached(plain) as cache:

        @tf.function
        def run(x):
            with cache:
                first = plain(x)
                return first, plain(x[:, :6])

        for _ in range(3):
            first, second = run(x)
            close(first, expected)
            close(second, expected[:, :6])
        assert run.experimental_get_tracing_count() == 1
        assert cache.stats().hit_tokens == 2 * 5 + 2 * 2 * (8 + 5)
    close(run(x)[0], expected)


def test_ragged_rows_and_no_room_in_a_graph(model: Small, cache: KVCache) -> None:
    @tf.function
    def run(x, lengths):
        return model(x, lengths=lengths)

    @tf.function(input_signature=[tf.TensorSpec([None, None], dtype) for dtype in (tf.int32, tf.bool)])
    def masked(x, mask):
        return model(x, attention_mask=mask)

    x, lengths = ids(3, 13), np.array([13, 5, 9])
    valid = np.arange(13) < lengths[:, None]
    expected = np.where(valid[:, :, None], model(tensor(x)).numpy(), 0)
    with cache:
        for _ in range(2):
            close(run(tensor(x), tensor(lengths)), expected)
            close(masked(tensor(x), tf.constant(valid)), expected)
        big = ids(9, 60)
        with pytest.warns(KVCacheWarning, match="no room"):
            y = masked(tensor(big), tf.ones((9, 60), tf.bool))
    close(y, model(tensor(big)))


def test_copies_in_a_graph(model: Small, cache: KVCache) -> None:
    """Half a block is shared: it is copied inside the graph."""
    run = in_graph(model, reduce_retracing=True)
    x = ids(1, 11)
    y = x.copy()
    y[0, 6:] = (x[0, 6:] + 1) % VOCAB
    expected = model(tensor(x)), model(tensor(y))
    with cache:
        close(run(tensor(x)), expected[0])
        close(run(tensor(y)), expected[1])
        close(run(tensor(x)), expected[0])
    assert cache.stats().hit_tokens == 6 + 10


def test_a_graph_that_raises_is_rolled_back_by_the_next_call(plain: Small) -> None:
    @tf.function
    def run(x, fail):
        y = plain(x)
        with tf.control_dependencies([tf.debugging.assert_equal(fail, 0, "asked to fail")]):
            return tf.identity(y)

    broken = tf.Variable(0)
    normal = plain.head.call

    def head(x, **_):
        # Inside the model: between the host's plan and its commit.
        with tf.control_dependencies([tf.debugging.assert_equal(broken, 0, "broken inside")]):
            return normal(tf.identity(x))

    x = tensor(ids(2, 9))
    expected = plain(x)
    plain.head.call = head
    try:
        with attached(plain) as cache, cache:
            close(run(x, 0), expected)
            live = cache.stats().live_blocks
            broken.assign(1)
            for _ in range(3):
                with pytest.raises(tf.errors.InvalidArgumentError, match="broken inside"):
                    run(tensor(ids(2, 9, seed=5)), 0)
            assert cache.stats().live_blocks > live
            broken.assign(0)
            close(run(x, 0), expected)
            assert cache.stats().live_blocks == live
            cache.core.check_valid()
    finally:
        plain.head.call = normal


def test_predict_inside_with(model: Small, cache: KVCache) -> None:
    x = ids(6, 9).astype("int32")
    model.compile()
    expected = model(tensor(x))
    with cache:
        for _ in range(2):
            close(model.predict(x, batch_size=2, verbose=0), expected)
    assert cache.stats().hit_tokens >= 6 * 8
    model.set_weights([weight * 1.5 for weight in model.get_weights()])
    close(model.predict(x, batch_size=2, verbose=0), model(tensor(x)))
    model.set_weights([weight / 1.5 for weight in model.get_weights()])
    model.predict_function = None


# ---- training ------------------------------------------------------------------------------------


def gradients(function, x, variables):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(function(x) ** 2)
    return [tf.convert_to_tensor(one) for one in tape.gradient(loss, variables)]


def test_gradients_outside_and_inside_are_plain(model: Small, cache: KVCache) -> None:
    x = tensor(ids(2, 9))
    expected = gradients(model, x, model.trainable_variables)
    with cache:
        model(x)
        with pytest.warns(KVCacheWarning, match="GradientTape"):
            inside = gradients(model, x, model.trainable_variables)
        traced = tf.function(lambda x: gradients(model, x, model.trainable_variables))(x)
    for one, two, three in zip(expected, inside, traced, strict=True):
        assert np.array_equal(one, two)
        np.testing.assert_allclose(three, one, rtol=1e-4, atol=1e-7)


def test_a_stopped_tape_may_use_the_cache(model: Small, cache: KVCache) -> None:
    x = tensor(ids(2, 9))
    with cache, tf.GradientTape() as tape, tape.stop_recording():
        model(x)
        model(x)
    assert cache.stats().bypassed_calls == 0
    assert cache.stats().hit_tokens == 16


def test_a_gradient_through_a_cached_graph_is_refused(model: Small, cache: KVCache) -> None:
    run = in_graph(model)
    x = tensor(ids(2, 9))
    with cache:
        run(x)  # traced without a tape: the cache is in the graph
        with pytest.raises(UsageError, match="no gradient"):
            gradients(run, x, model.trainable_variables)


def test_fit_inside_with_trains_as_outside() -> None:
    trained = []
    for use_cache in (False, True):
        keras.utils.set_random_seed(7)
        model = functional(blocks=1)
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
        x = ids(8, 7).astype("int32")
        if use_cache:
            cache = KVCache(size=64, block_size=4)
            cache.attach(model)
            with cache:
                with pytest.warns(KVCacheWarning, match="training=True"):
                    model.fit(x, x, batch_size=4, verbose=0, shuffle=False)
                fitted = model(tensor(x))
            cache.detach()
            close(fitted, model(tensor(x)))
        else:
            model.fit(x, x, batch_size=4, verbose=0, shuffle=False)
        trained.append(model.get_weights())
    for one, two in zip(*trained, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_training_true_uses_dropout(model: Small, cache: KVCache) -> None:
    x = tensor(ids(2, 9))
    with cache, pytest.warns(KVCacheWarning, match="training"):
        assert not np.allclose(model(x, training=True), model(x, training=True))


# ---- changed weights -----------------------------------------------------------------------------


def test_changed_weights_are_noticed(model: Small, cache: KVCache, tmp_path) -> None:
    x = tensor(ids(2, 9))
    path = tmp_path / "before.weights.h5"
    model.save_weights(path)
    optimizer = keras.optimizers.SGD(0.5)
    changes = {
        "assign": lambda: model.embed.embeddings.assign(model.embed.embeddings * 2),
        "set_weights": lambda: model.set_weights([weight * 1.01 for weight in model.get_weights()]),
        "one element": lambda: model.head.bias.assign(model.head.bias + np.eye(VOCAB)[7]),
        "optimizer": lambda: optimizer.apply(gradients(model, x, model.trainable_variables), model.trainable_variables),
    }
    for name, change in changes.items():
        with cache:
            model(x)
            hits = cache.stats().hit_tokens
            model(x)
            assert cache.stats().hit_tokens == hits + 16, name
        change()
        with cache:
            hits = cache.stats().hit_tokens
            close(model(x), model.call.original(x))
            assert cache.stats().hit_tokens == hits, name
    # Also between two calls in one block. Going back to earlier weights is a change like any other.
    with cache:
        model.load_weights(path)
        hits = cache.stats().hit_tokens
        close(model(x), model.call.original(x))
        assert cache.stats().hit_tokens == hits


def test_invalidate_and_clear(model: Small, cache: KVCache) -> None:
    x = tensor(ids(2, 9))
    for forget in (cache.invalidate, cache.clear):
        with cache:
            model(x)
            forget()
            hits = cache.stats().hit_tokens
            model(x)
            assert cache.stats().hit_tokens == hits


# ---- attaching -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Small, functional, sequential])
def test_detach_restores_exactly(make) -> None:
    model = make()
    model(tensor([[1]]))
    before, signature = dict(vars(model)), model._call_signature
    cache = KVCache(size=8)
    cache.attach(model)
    assert "call" in vars(model)
    cache.detach()
    assert vars(model).keys() == before.keys()
    assert model._call_signature is signature


def test_a_call_of_the_models_own_is_restored() -> None:
    model = Small()
    own = model.call
    vars(model)["call"] = own
    cache = KVCache(size=8)
    cache.attach(model)
    cache.detach()
    assert vars(model)["call"] is own


def test_a_copy_of_an_attached_model_is_plain(model: Small, cache: KVCache) -> None:
    built = functional()
    own = KVCache(size=16)
    own.attach(built)
    copied = copy.deepcopy(built)
    x = tensor(ids(1, 5))
    with own:
        close(copied(x), built(x))
    assert own.stats().miss_tokens == 5
    own.detach()


def test_bad_input_and_nothing_lost(model: Small, cache: KVCache) -> None:
    x = tensor(ids(2, 9))
    with cache:
        model(x)
        before = cache.stats()
        bad = [
            (tf.zeros((2, 3)), {}, InvalidType, "integers"),
            (tensor(ids(9)), {}, InvalidInput, r"\[B, T\]"),
            (tf.zeros((2, 3, 4), tf.int32), {}, InvalidInput, r"\[B, T\]"),
            (tf.zeros((2, 0), tf.int32), {}, InvalidInput, "at least one"),
            (tensor([[1, VOCAB]]), {}, InvalidInput, str(VOCAB - 1)),
            (tensor([[1, -1]]), {}, InvalidInput, "-1|integer"),
            (x, {"lengths": [9, 0]}, InvalidInput, "at least one token"),
            (x, {"lengths": [9, 10]}, InvalidInput, "at most 9"),
            (x, {"lengths": [9]}, InvalidInput, "2 whole numbers"),
            (x, {"mask": np.ones((2, 8))}, InvalidInput, "mask must be"),
            (x, {"mask": np.arange(18).reshape(2, 9) % 2}, InvalidInput, "holes"),
        ]
        for values, arguments, error, message in bad:
            with pytest.raises(error, match=message):
                model(values, **arguments)
        assert cache.stats() == before
        with pytest.raises(tf.errors.OpError, match="InvalidInput"):
            in_graph(model)(tensor([[1, VOCAB]]))
        close(model(x), model.call.original(x))


def test_using_a_cache_the_wrong_way(model: Small, cache: KVCache) -> None:
    with pytest.raises(UsageError, match="no model is attached"), KVCache(size=4):
        pass
    other = KVCache(size=4)
    with pytest.raises(UsageError, match="another cache"):
        other.attach(model)
    second = functional()
    other.attach(second)
    with cache, pytest.raises(UsageError, match="nested"), other:
        pass
    with cache, pytest.raises(UsageError, match="nested"), cache:
        pass
    other.detach()
    with pytest.raises(InvalidType, match="Keras model"):
        other.attach(lambda x: x)
    for wrong in ({"size": 0}, {"memory": "two"}, {"dtype": "int4"}, {"size": 4, "memory": 5}):
        with pytest.raises(InvalidInput):
            KVCache(**wrong)


class Broken(keras.Model):
    """Uses a layer twice, or changes a shape or dtype after the first run."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.on = fault, int(fault in ("twice", "gap", "none"))  # a number: yes or no would be a switch
        self.embed = keras.layers.Embedding(20, 8)

    def call(self, x):
        h = self.embed(x)[:, :, None]
        k = h
        if self.on and self.fault == "shape":
            k = tf.concat((h, h), axis=-1)
        if self.on and self.fault == "dtype":
            k = h = tf.cast(h, tf.float64)
        if self.fault == "none":
            return h[:, :, 0]
        window = 3 if self.on and self.fault == "window" else None
        y = attention(k if self.fault == "shape" else h, k, k, layer=1 if self.fault == "gap" else 0, window=window)
        if self.on and self.fault == "twice":
            y = attention(y, y, y, layer=0)
        if self.on and self.fault == "positions":
            positions(7)
        return tf.cast(y, tf.float32)[:, :, 0]


@pytest.mark.parametrize("fault", ["twice", "gap", "none", "shape", "dtype", "window", "positions"])
def test_a_model_that_breaks_the_rules(fault: str) -> None:
    model = Broken(fault)
    cache = KVCache(size=16, block_size=4)
    cache.attach(model, outputs="last")
    if model.on:
        with pytest.raises(InvalidInput, match=r"layer numbers|twice|no call"):
            cache.core.check_valid()
        return
    seq = cache.open([1, 2, 3])
    model.on = 1
    if fault == "positions":
        cache.step([seq], [[1, 2]])
    with pytest.raises((InvalidInput, InvalidType), match=r"layer 0|positions"):
        cache.step([seq], [[3]] if fault == "positions" else [[1, 2, 3]])
    cache.core.check_valid()
    model.on = 0
    cache.runner._functions.clear()
    assert cache.step([seq], [[3]]).shape == (1, 8)
    seq.close()
