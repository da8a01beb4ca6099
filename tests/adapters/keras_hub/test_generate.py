"""``causal_lm.generate`` from a cache: what KerasHub's own gives, and what recomputing everything gives."""

from __future__ import annotations

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf

from kvcache_core import InvalidInput, InvalidType, KVCacheWarning
from kvcache_core.testing import assert_cached_equals_recompute
from kvcache_keras import KVCache
from kvcache_keras.hub import attach
from tests.adapters.keras_hub.families import batch, build, own, run

pytestmark = pytest.mark.filterwarnings("ignore:You are using a softmax over axis")


@pytest.fixture(scope="module")
def llama():
    return build("Llama")


@pytest.fixture(scope="module")
def attached(llama):
    cache = KVCache(size=64, block_size=4)
    attach(llama, cache)
    return cache


@pytest.fixture
def cache(llama, attached):
    """Empty, with the graphs that were traced before."""
    attached.clear()
    yield attached
    llama.compile(sampler="greedy", run_eagerly=True)


@pytest.mark.parametrize(
    "sampler",
    [
        lambda: keras_hub.samplers.TopKSampler(k=5, seed=3),
        pytest.param(lambda: keras_hub.samplers.TopPSampler(p=0.8, seed=3, temperature=1.5), marks=pytest.mark.slow),
        pytest.param(lambda: keras_hub.samplers.RandomSampler(seed=3), marks=pytest.mark.slow),
        lambda: keras_hub.samplers.BeamSampler(num_beams=3),
    ],
)
def test_samplers_choose_what_the_library_chooses(llama, cache, sampler):
    inputs, before = batch((6, 4, 6), width=10), cache.stats()
    llama.compile(sampler=sampler(), run_eagerly=True)
    expected = own(llama, inputs)
    llama.compile(sampler=sampler(), run_eagerly=True)
    found = run(llama, inputs)
    np.testing.assert_array_equal(found, expected)
    assert cache.stats().live_blocks == 0
    assert cache.stats().bypassed_calls == before.bypassed_calls
    assert cache.stats().miss_tokens > before.miss_tokens


@pytest.mark.parametrize("sampler", ["greedy", pytest.param("beam", marks=pytest.mark.slow)])
def test_stop_tokens_end_where_the_library_ends(llama, cache, sampler):
    inputs = batch(width=12)
    llama.compile(sampler=sampler, run_eagerly=True)
    free, _ = own(llama, inputs)
    stop = [int(free[0, 10]), int(free[1, 9]), int(free[2, 7])]
    expected = own(llama, inputs, stop)
    found = run(llama, inputs, stop)
    np.testing.assert_array_equal(found, expected)
    assert not expected[1].all()


def test_contrastive_search_is_left_as_it_was(llama, cache):
    contrastive = getattr(keras_hub.samplers, "ContrastiveSampler", None)
    if contrastive is None:
        pytest.skip("this KerasHub has no contrastive sampler")
    llama.compile(sampler=contrastive(k=2), run_eagerly=True)
    inputs, before = batch((4,), width=6), cache.stats()
    np.testing.assert_array_equal(run(llama, inputs), own(llama, inputs))
    assert cache.stats().miss_tokens == before.miss_tokens


def test_a_request_that_does_not_fit_is_computed_by_the_library():
    model, cache = build("Llama"), KVCache(size=3, block_size=4)
    attach(model, cache)
    with pytest.warns(KVCacheWarning, match="no room"):
        found = run(model, batch())
    np.testing.assert_array_equal(found, own(model, batch()))
    assert cache.stats().bypassed_calls == 1


def test_new_prompt_lengths_cost_no_trace(llama, cache):
    for width in (6, 9, 12):
        run(llama, batch((3, 2), width=width))
    assert set(cache.runner.traces.values()) == {1}


def test_detach_gives_back_the_model_that_was_attached():
    llama = build("Llama")

    def own_attributes(layer):
        return {name: id(value) for name, value in vars(layer).items()}

    layers = list(llama._flatten_layers())
    before = [own_attributes(layer) for layer in layers]
    cache = KVCache(size=8)
    attach(llama, cache)
    assert [own_attributes(layer) for layer in layers] != before
    cache.detach()
    assert [own_attributes(layer) for layer in layers] == before


def test_only_causal_language_models_are_taken():
    with pytest.raises(InvalidType, match="CausalLM"):
        attach(object(), KVCache(size=4))


class Letters:
    """A preprocessor of one token per letter; ``.`` ends a text."""

    letters = ".abcdefghijklmnopqrstuvwxyz"

    class tokenizer:  # noqa: N801  # as a preprocessor names it
        end_token_id = 31

    def generate_preprocess(self, texts, sequence_length=None):
        width = sequence_length or 10
        ids = np.zeros((len(texts), width), np.int32)
        for row, given in enumerate(texts):
            text = given if isinstance(given, str) else bytes(given).decode()
            ids[row, : len(text)] = [30 + self.letters.index(letter) for letter in text]
        return {"token_ids": tf.constant(ids), "padding_mask": tf.constant(ids > 0)}

    def generate_postprocess(self, outputs):
        kept = zip(np.asarray(outputs["token_ids"]), np.asarray(outputs["padding_mask"]), strict=True)
        return ["".join(f"<{token}>" for token in row[mask]) for row, mask in kept]


def test_strings_go_in_and_come_out_as_ever():
    model = keras_hub.models.LlamaCausalLM(build("Llama").backbone, preprocessor=Letters())
    model.compile(sampler="greedy", run_eagerly=True)

    def calls():
        return [
            model.generate("abcab"),
            model.generate(["abcab", "abd"], max_length=8),
            model.generate(["abcab", "abd"], max_length=8, strip_prompt=True),
            model.generate(["abcab", "abd"], stop_token_ids=None),
            model.generate(tf.data.Dataset.from_tensor_slices(["abcab", "abd", "b"]).batch(2)),
        ]

    expected = calls()
    cache = KVCache(size=64, block_size=4)
    attach(model, cache)
    assert calls() == expected
    assert calls() == expected
    assert cache.stats().bypassed_calls == 0
    assert isinstance(expected[0], str)


@pytest.mark.filterwarnings("ignore:`compile..` was not called as part of model loading")
def test_a_model_loaded_from_an_attached_one_is_plain(llama, cache, tmp_path):
    llama.save(tmp_path / "llama.keras")
    loaded = keras.models.load_model(tmp_path / "llama.keras")
    assert not any({"call", "_compute_attention"} & vars(layer).keys() for layer in loaded._flatten_layers())
    assert "make_generate_function" not in vars(loaded)
    inputs = batch((4,), width=6)
    np.testing.assert_array_equal(loaded(inputs), llama(inputs))


def test_left_padding_is_computed_by_the_library(llama, cache):
    inputs = batch((6,), width=8)
    inputs["padding_mask"] = tf.constant([[False, False, True, True, True, True, False, False]])
    with pytest.warns(KVCacheWarning, match="padded on the left"):
        found = run(llama, inputs)
    np.testing.assert_array_equal(found, own(llama, inputs))


def test_phi3_with_scaled_positions_is_refused_by_name():
    backbone = keras_hub.models.Phi3Backbone(
        vocabulary_size=20,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=2,
        hidden_dim=8,
        intermediate_dim=8,
        rope_scaling_type="su",
        rope_scaling_short_factor=[1.0, 1.0],
        rope_scaling_long_factor=[2.0, 2.0],
        pretraining_sequence_length=8,
        max_sequence_length=32,
    )
    model, cache = keras_hub.models.Phi3CausalLM(backbone, preprocessor=None), KVCache(size=4)
    with pytest.raises(InvalidInput, match="Phi3SuScaledRotaryEmbedding"):
        attach(model, cache)
    assert cache.model is None
    assert not any("call" in vars(layer) for layer in model._flatten_layers())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Llama", "BLOOM", "Gemma 2"])
def test_bfloat16(family):
    keras.config.set_dtype_policy("bfloat16")
    try:
        model = build(family)
    finally:
        keras.config.set_dtype_policy("float32")
    assert_cached_equals_recompute(model, KVCache(size=64, block_size=4), max_length=16, max_new_tokens=3, rounds=1)
