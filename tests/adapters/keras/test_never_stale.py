"""However a Keras model's weights change, nothing computed with the old ones is served."""

from __future__ import annotations

import ctypes
import itertools
import os
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow.core.framework import resource_handle_pb2

from kvcache_core import StaleSequence
from kvcache_keras import KVCache, fingerprint, generate
from tests.adapters.keras.models import Small, greedy, ids


class Lora(keras.layers.Layer):
    """A dense layer with adapters by name: one is active, or merged into the weight."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.adapters = {}
        self.active = None

    def load(self, name, seed):
        width, out = self.base.kernel.shape
        random = np.random.default_rng(seed)
        down, up = keras.layers.Dense(2, use_bias=False), keras.layers.Dense(out, use_bias=False)
        down.build((None, width))
        up.build((None, 2))
        for layer in (down, up):
            layer.kernel.assign(random.normal(size=layer.kernel.shape))
        self.adapters = {**self.adapters, name: [down, up]}

    def merge(self, name):
        down, up = self.adapters[name]
        self.base.kernel.assign_add(tf.matmul(down.kernel.value, up.kernel.value))

    def call(self, x):
        y = self.base(x)
        if self.active is None:
            return y
        down, up = self.adapters[self.active]
        return y + up(down(x))


class Trunk(keras.Model):
    def __init__(self):
        super().__init__()
        keras.utils.set_random_seed(0)
        self.lora = Lora(keras.layers.Dense(24))
        self.norm = keras.layers.BatchNormalization()
        self.head = keras.layers.Dense(4)
        self.lora.base.build((None, 8))
        self.norm.build((None, 24))
        self.head.build((None, 24))
        self.lora.built = self.built = True

    def call(self, x, training=False):
        return self.head(keras.ops.tanh(self.norm(self.lora(x), training=training)))


def an_optimizer_step(model, _):
    optimizer = keras.optimizers.SGD(0.5)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(tf.ones((3, 8))) ** 2)
    weights = [model.head.kernel, model.head.bias]
    optimizer.apply(tape.gradient(loss, weights), weights)


def weights_set(model, _):
    model.set_weights([weight + 0.5 for weight in model.get_weights()])


def assigned(model, _):
    model.head.kernel.assign(model.head.kernel * 2)


def in_place(model, _):
    model.head.kernel.value.assign_add(tf.ones(model.head.kernel.shape))


def a_row(model, _):
    model.head.kernel.value.scatter_nd_update([[2]], [[9.0, 1.0, 2.0, 3.0]])


def loaded(model, folder):
    path, before = folder / "state.weights.h5", model.get_weights()
    model.set_weights([weight * 1.5 for weight in before])
    model.save_weights(path)
    model.set_weights(before)
    model.load_weights(path)


def a_new_layer(model, _):
    model.head = keras.layers.Dense(4)
    model.head.build((None, 24))


def a_new_adapter(model, _):
    model.lora.load("a", 3)
    model.lora.active = "a"


def the_same_adapter_name_with_new_weights(model, _):
    model.lora.load("a", 4)


def merged(model, _):
    model.lora.active = None
    model.lora.merge("a")


def batch_statistics(model, _):
    model(tf.ones((4, 8)) * tf.range(4.0)[:, None], training=True)


CHANGES = [
    an_optimizer_step,
    weights_set,
    assigned,
    in_place,
    a_row,
    loaded,
    a_new_layer,
    a_new_adapter,
    the_same_adapter_name_with_new_weights,
    merged,
    batch_statistics,
]


def plain(model, x):
    return np.asarray(model.call.original(x))


@pytest.mark.parametrize("verify", ["sample", "full"])
def test_a_history_of_every_change(verify, tmp_path):
    model = Trunk()
    cache = KVCache(512, verify=verify)
    cache.attach(model, kind="activation")
    x = tf.constant(np.random.default_rng(0).normal(size=(3, 8)), tf.float32)
    before = None
    for change in (None, *CHANGES):
        if change is not None:
            change(model, tmp_path)
        expected = plain(model, x)
        if before is not None:
            assert np.allclose(before, expected, atol=1e-4) == (change is merged), change.__name__
        before = expected
        for _ in range(2):
            with cache:
                np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    assert cache.stats().hit_entries == 3 * (1 + len(CHANGES)), "and unchanged weights are served"


@settings(max_examples=10)
@given(st.lists(st.sampled_from(CHANGES), min_size=1, max_size=4))
def test_any_order_of_changes(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("changes")
    model = Trunk()
    model.lora.load("a", 2)
    cache = KVCache(512)
    cache.attach(model, kind="activation")
    x = tf.constant(np.random.default_rng(0).normal(size=(3, 8)), tf.float32)
    with cache:
        model(x)
    for change in changes:
        change(model, folder)
        with cache:
            np.testing.assert_allclose(model(x), plain(model, x), rtol=1e-4, atol=1e-5)


# ---- what went wrong elsewhere ---------------------------------------------------------------------------------------


def decoder():
    """One layer: what a change of the weights does is the same for each."""
    keras.utils.set_random_seed(0)
    model = Small(layers=1)
    model(tf.constant(ids(1, 4)))
    cache = KVCache(256, block_size=4)
    cache.attach(model, outputs="last")
    return model, cache


def answers(model, prompts, cache=None):
    return greedy(model, prompts, 4) if cache is None else generate(model, prompts, max_new_tokens=4, cache=cache)


def test_an_adapter_loaded_again_under_its_name():
    """As in vllm issue 42125: a second adapter of the same name must not meet what was computed with the first."""
    keras.utils.set_random_seed(0)
    model = Small(layers=1)
    lora = Lora(model.projections[0])
    lora.base.build((None, 16))
    lora.load("tone", 1)
    lora.active = "tone"
    model.projections = [lora]
    model(tf.constant(ids(1, 4)))
    seen = []
    prompt = ids(20).tolist()
    cache = KVCache(256, block_size=4)
    cache.attach(model, outputs="last")
    for seed in (1, 2):
        random = np.random.default_rng(seed)
        for layer in lora.adapters["tone"]:
            layer.kernel.assign(3 * random.normal(size=layer.kernel.shape))
        before = cache.stats().hit_tokens
        seen.append(answers(model, [prompt], cache))
        assert cache.stats().hit_tokens == before, "nothing of another load is found"
        assert seen[-1] == answers(model, [prompt])
    assert seen[0] != seen[1]


def test_weights_swapped_under_a_prefix_that_many_requests_share():
    """As in lmdeploy issue 4917: weights are replaced while a system prompt is cached and reported as hit."""
    model, cache = decoder()
    system = ids(24).tolist()
    answers(model, [[*system, 1, 2]], cache)
    running = cache.open([*system, 3])
    assert running.num_cached >= 20
    model.set_weights([weight[::-1].copy() for weight in model.get_weights()])
    before = cache.stats().hit_tokens
    prompts = [[*system, 1, 2], [*system, 3, 4]]
    assert [answers(model, [each], cache)[0] for each in prompts] == answers(model, prompts)
    assert cache.stats().hit_tokens - before <= len(system), "the second finds what the first computed, no more"
    with pytest.raises(StaleSequence):
        cache.step([running], [[3]])
    running.close()


def test_weights_updated_between_two_generations_of_a_training_run():
    """As in prime-rl PR 1650: the policy is updated in place between rollouts, and old state skews what it samples."""
    model, cache = decoder()
    optimizer = keras.optimizers.SGD(0.3)
    prompts = [ids(12).tolist(), ids(14).tolist()]
    for step in range(3):
        assert answers(model, prompts, cache) == answers(model, prompts), step
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(tf.constant(ids(1, 20, seed=1))) ** 2)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)


# ---- large weights: what a sample of the content would miss ----------------------------------------------------------


def an_element(variable):
    variable.scatter_nd_add([[700, 30]], [9.0])


def a_row_by_slice(variable):
    variable[700].assign(variable.value()[700] + 1.0)


def an_element_by_assign(variable):
    values = variable.numpy()
    values[700, 30] += 1e-3
    variable.assign(values)


def in_a_graph(variable):
    tf.function(lambda: variable.assign_sub(tf.one_hot(700, 1000)[:, None] * tf.ones(variable.shape)))()


def compiled_by_xla(variable):
    tf.function(lambda: variable.assign_sub(tf.ones(variable.shape) * 1e-4), jit_compile=True)()


def past_tensorflow(variable):
    address = np.from_dlpack(variable.value()).ctypes.data
    memory = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), tuple(variable.shape))
    memory *= 1.5


EDITS = [an_element, a_row_by_slice, an_element_by_assign, in_a_graph, compiled_by_xla]


def large():
    layer = keras.layers.Dense(64)
    layer.build((None, 1000))
    cache = KVCache(64)
    cache.attach(layer, kind="activation")
    x = tf.constant(np.random.default_rng(0).normal(size=(2, 1000)), tf.float32)
    return layer, cache, x


@settings(max_examples=8)
@given(st.lists(st.sampled_from(EDITS), min_size=1, max_size=3), st.booleans())
def test_the_first_look_finds_an_edit_of_a_large_weight(edits, graph):
    layer, cache, x = large()
    with cache:
        called = tf.function(layer) if graph else layer
        called(x)
        for count, edit in enumerate(edits, 1):
            called(x)
            assert cache.stats().hit_entries == 2 * count, "and unchanged weights are served"
            edit(layer.kernel.value)
            expected = tf.matmul(x, layer.kernel.value) + layer.bias
            np.testing.assert_allclose(called(x), expected, rtol=1e-3, atol=1e-4)
            assert cache.stats().miss_entries == 2 * (count + 1), edit.__name__


def test_all_elements_written_past_tensorflow():
    layer, cache, x = large()
    with cache:
        layer(x)
        past_tensorflow(layer.kernel.value)
        np.testing.assert_allclose(layer(x), tf.matmul(x, layer.kernel.value) + layer.bias, rtol=1e-3, atol=1e-4)
    assert cache.stats().hit_entries == 0


def test_an_edit_while_the_module_is_detached():
    layer, cache, x = large()
    with cache:
        layer(x)
    cache.detach(layer)
    an_element(layer.kernel.value)
    cache.attach(layer, kind="activation")
    with cache:
        np.testing.assert_allclose(layer(x), tf.matmul(x, layer.kernel.value) + layer.bias, rtol=1e-3, atol=1e-4)
    assert cache.stats().hit_entries == 0


def test_the_same_values_elsewhere_in_memory_are_no_change():
    layer, cache, x = large()
    with cache:
        layer(x)
        layer.kernel.assign(layer.kernel.numpy())
        layer(x)
        tf.gather(layer.kernel.value, [1])  # from now on each read of the variable is a copy
        layer(x)
        layer(x)
    assert cache.stats().hit_entries == 6


def nobodys(variable):
    return resource_handle_pb2.ResourceHandleProto(container="Anonymous", name="nobody's")


def unreadable(variable):
    return resource_handle_pb2.ResourceHandleProto.FromString(b"abc")


@pytest.mark.parametrize(
    ("name", "value"),
    [("_name_of", nobodys), ("_name_of", unreadable), ("_KEPT", 0)],
    ids=["nobody", "garbled", "many"],
)
def test_where_variables_are_not_read_by_name_a_look_notices_the_same(name, value, monkeypatch):
    monkeypatch.setattr(fingerprint, name, value)
    assert fingerprint._one_read([tf.Variable(1.0)]) is None
    for edit in (*EDITS, past_tensorflow):
        layer, cache, x = large()
        with cache:
            layer(x)
            layer(x)
            edit(layer.kernel.value)
            layer(x)
        stats = cache.stats()
        assert (stats.hit_entries, stats.miss_entries) == (2, 4), edit.__name__


def test_nothing_waits_for_a_look_that_reads(monkeypatch):
    """A graph's host call that waited would keep a thread of TensorFlow's, which the look may need."""
    layer, cache, x = large()
    with cache:
        layer(x)
    weights = cache.weights_of(layer)
    samples = weights.sample()

    def reading():
        other = threading.Thread(target=weights.digest_of_samples, args=(samples,), daemon=True)
        other.start()
        other.join(60)
        assert not other.is_alive()
        return samples

    monkeypatch.setattr(weights, "_read_all", reading)
    assert not weights.moved()
    assert weights.digest() == weights.digest_of_samples(samples)


def test_a_look_needs_no_thread_of_tensorflows(monkeypatch):
    monkeypatch.setattr(fingerprint, "_reads", itertools.count())  # one of the first in its process
    monkeypatch.setattr(fingerprint, "_KEPT", 1)
    layer, cache, x = large()
    with cache:
        layer(x)
    weights, go, waiting = cache.weights_of(layer), threading.Event(), threading.Semaphore(0)

    def wait(value):
        waiting.release()
        go.wait(120)
        return value

    graph = tf.function(lambda value: tf.numpy_function(wait, [value], tf.float32))
    callers = [threading.Thread(target=graph, args=(tf.constant(1.0),)) for _ in range(os.cpu_count() + 2)]
    look = threading.Thread(target=lambda: (weights.digest(), weights.moved()), daemon=True)
    try:
        for caller in callers:
            caller.start()
        assert waiting.acquire(timeout=60)  # one is there: the others are, or wait for its thread
        look.start()
        look.join(60)
        assert not look.is_alive()
    finally:
        go.set()
        for caller in callers:
            caller.join()


def test_where_eager_execution_is_asynchronous_a_look_notices_the_same():
    layer, cache, x = large()
    with cache:
        layer(x)
    tf.config.experimental.set_synchronous_execution(False)
    try:
        with cache:
            layer(x)
        layer.kernel.assign(2.0 * layer.kernel)
        with cache:
            layer(x)
    finally:
        tf.config.experimental.set_synchronous_execution(True)
    stats = cache.stats()
    assert (stats.hit_entries, stats.miss_entries) == (2, 4)


@pytest.mark.parametrize("kept", [1, 0])
def test_a_weight_of_every_dtype(kept, monkeypatch):
    monkeypatch.setattr(fingerprint, "_reads", itertools.count())
    monkeypatch.setattr(fingerprint, "_KEPT", kept)
    layer = keras.layers.Layer()
    dtypes = ["bfloat16", "float16", "float32", "float64", "int8", "int64", "uint16", "bool", "complex64"]
    shapes = [(), (3, 300), (0, 4)]
    for dtype in dtypes:
        for shape in shapes:
            layer.add_weight(shape=shape, dtype=dtype, initializer="zeros", trainable=False)
    layer.built = True
    looks = fingerprint.Fingerprint(layer)
    seen = [looks.digest()]
    assert looks.digest() == seen[0]
    for weight in layer.weights:
        weight.assign(tf.ones(weight.shape, weight.dtype))
        seen.append(looks.digest())
        assert (seen[-1] != seen[-2]) == bool(np.prod(weight.shape)), weight.dtype
        assert looks.digest() == seen[-1]


# ---- switched, with the same weights ---------------------------------------------------------------------------------


def two_adapters():
    model = Trunk()
    for name, seed in (("a", 3), ("b", 4)):
        model.lora.load(name, seed)
    cache = KVCache(64)
    cache.attach(model, kind="activation")
    return model, cache, tf.constant(np.random.default_rng(0).normal(size=(3, 8)), tf.float32)


def test_a_switched_adapter_and_what_was_computed_with_each():
    model, cache, x = two_adapters()
    found = []
    for active in (None, "a", "b", "a", None):
        model.lora.active = active
        with cache:
            np.testing.assert_allclose(model(x), plain(model, x), rtol=1e-4, atol=1e-5)
        found.append(cache.stats().hit_entries)
    assert found == [0, 0, 0, 3, 6], "each adapter finds its own"


def test_a_graph_goes_by_the_adapter_that_it_was_traced_with():
    model, cache, x = two_adapters()
    model.lora.active = "a"
    with cache:
        graph = tf.function(model)
        first = graph(x)
        model.lora.active = "b"
        second = graph(x + 1.0)
        np.testing.assert_allclose(model(x), plain(model, x), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model(x + 1.0), plain(model, x + 1.0), rtol=1e-4, atol=1e-5)
        assert cache.stats().hit_entries == 0
        model.lora.active = "a"
        np.testing.assert_allclose(model(x), first)
        np.testing.assert_allclose(model(x + 1.0), second)
    assert cache.stats().hit_entries == 6
    np.testing.assert_allclose(first, plain(model, x), rtol=1e-4, atol=1e-5)


def uncached(model, prompt):
    """By the graph that is kept as long as the model stays as it is."""
    return generate(model, [prompt], max_new_tokens=4)


def test_an_adapter_switched_and_a_layer_replaced_under_prompts():
    keras.utils.set_random_seed(0)
    model = Small(layers=1)
    lora = Lora(model.projections[0])
    lora.base.build((None, 16))
    for name, seed in (("a", 1), ("b", 2)):
        lora.load(name, seed)
    model.projections = [lora]
    model(tf.constant(ids(1, 4)))
    cache = KVCache(256, block_size=4)
    cache.attach(model, outputs="last")
    prompt, seen = ids(20).tolist(), []
    for active in ("a", "b", "a"):
        lora.active = active
        seen.append(answers(model, [prompt], cache))
        assert seen[-1] == answers(model, [prompt]) == uncached(model, prompt), active
    assert seen[0] == seen[2] != seen[1]
    assert cache.open(prompt).num_cached >= 16, "what the adapter computed earlier is found"
    other = keras.layers.Dense(lora.base.kernel.shape[1])
    other.build((None, 16))
    model._tracker.unlock()  # else Keras refuses another layer
    model.projections = [other]
    assert answers(model, [prompt], cache) == answers(model, [prompt]) == uncached(model, prompt) != seen[0]


def test_an_open_sequence_raises_at_its_next_step():
    model, cache = decoder()
    tokens = ids(9).tolist()
    for step in (cache.step, lambda seqs, tokens: cache.decode_greedy(seqs, tokens, 2)):
        seq = cache.open(tokens)
        cache.step([seq], [tokens[seq.num_cached :]])
        model.set_weights([weight * 1.5 for weight in model.get_weights()])
        with pytest.raises(StaleSequence, match="weights changed"):
            step([seq], [[1]])
        seq.close()


# ---- on another device -----------------------------------------------------------------------------------------------


def test_variables_that_are_not_in_the_cpus_memory_are_sampled_where_they_are(monkeypatch):
    layer, _, _ = large()
    with monkeypatch.context() as patch:
        patch.setattr(type(layer.kernel.value), "device", property(lambda variable: "/device:GPU:0"))
        looks = fingerprint.Fingerprint(layer)
    assert not looks._here
    seen = [looks.digest()]
    assert looks.digest() == seen[0] and not looks.moved()
    edits = (
        lambda: layer.kernel.assign(layer.kernel * 1.5),
        lambda: layer.bias.assign_add(tf.one_hot(17, 64)),
    )
    for edit in edits:
        edit()
        assert looks.moved()
        seen.append(looks.digest())
        assert seen[-1] not in seen[:-1] and looks.digest() == seen[-1] and not looks.moved()
