"""Encoder-decoder models: the encoder runs once per input, and no prefix is taken from another input."""

from __future__ import annotations

import keras_hub
import numpy as np
import pytest
import tensorflow as tf

from kvcache_core import InvalidInput, UsageError
from kvcache_keras import KVCache
from kvcache_keras.hub import attach, generate
from tests.adapters.keras_hub.families import SEQ2SEQ, VOCAB, build, whisper
from tests.supported import claimed, proven

pytestmark = pytest.mark.filterwarnings("ignore:You are using a softmax over axis")


TABLE = "Keras: KerasHub, encoder-decoder"
MODES = {"greedy", "sampling", "padding", "beam search", "small pool"}


def test_the_table_claims_what_is_tested_here_and_no_more():
    assert claimed(TABLE) == {(family, mode) for family in (*SEQ2SEQ, "Whisper") for mode in MODES}


def batch(family, seed=0, lengths=(5, 3, 5), width=9):
    """Three rows, of which the first and the last have the same encoder input."""
    random = np.random.default_rng(seed)
    if family == "BART":
        mask = np.arange(7) < np.array([7, 5, 7])[:, None]
        read = {"encoder_token_ids": np.where(mask, random.integers(1, VOCAB, (3, 7)), 0).astype(np.int32)}
    else:
        mask = np.ones((3, 2000), bool)
        read = {"encoder_input_values": random.normal(size=(3, 2000, 1)).astype(np.float32)}
    for value in read.values():
        value[2] = value[0]
    given = np.arange(width) < np.array(lengths)[:, None]
    ids = np.where(given, random.integers(1, VOCAB, (3, width)), 0)
    inputs = {**read, "encoder_padding_mask": mask, "decoder_token_ids": ids.astype(np.int32)}
    return {name: tf.constant(value) for name, value in (inputs | {"decoder_padding_mask": given}).items()}


def run(model, inputs, function=None):
    result = (function or model.make_generate_function())(dict(inputs), stop_token_ids=None)
    return np.asarray(result["decoder_token_ids"])


def own(model, inputs):
    """KerasHub's own generation of an attached model."""
    result = run(model, inputs, type(model).make_generate_function(model))
    model.generate_function = None
    return result


def recompute(model, inputs):
    tokens, given = np.array(inputs["decoder_token_ids"]), np.array(inputs["decoder_padding_mask"])
    for column in range(given.sum(1).min(), tokens.shape[1]):
        part = {
            "decoder_token_ids": tf.constant(tokens[:, :column]),
            "decoder_padding_mask": tf.ones((3, column), tf.bool),
        }
        logits = np.asarray(model({**inputs, **part}))[:, -1]
        tokens[:, column] = np.where(given[:, column], tokens[:, column], logits.argmax(-1))
    return tokens


def samplers():
    """What is tried besides greedy: makers of samplers."""
    return (
        lambda: keras_hub.samplers.TopKSampler(k=4, seed=3),
        lambda: keras_hub.samplers.TopPSampler(p=0.9, seed=3),
        lambda: keras_hub.samplers.BeamSampler(num_beams=3),
    )


# Every column of every row is computed eagerly, by KerasHub too. A second sampler that draws goes the first one's way.
@pytest.mark.parametrize(
    ("family", "tried"),
    [
        ("BART", samplers()[::2]),
        pytest.param("BART", samplers(), marks=pytest.mark.slow),
        pytest.param("Moonshine", samplers(), marks=pytest.mark.slow),
    ],
    ids=["BART", "BART, all samplers", "Moonshine"],
)
def test_generate(family, tried):
    model, first, second = build(family), batch(family), batch(family, seed=1)
    expected = [recompute(model, inputs) for inputs in (first, second)]
    np.testing.assert_array_equal(own(model, first), expected[0])
    encoded = []
    encode, model.call_encoder = (
        model.call_encoder,
        lambda *args, **named: encoded.append(args) or encode(*args, **named),
    )
    cache = KVCache(size=64, block_size=4)
    attach(model, cache)
    for inputs, tokens in zip((first, second, first), (*expected, expected[0]), strict=True):
        np.testing.assert_array_equal(run(model, inputs), tokens)
    assert len(encoded) == 1  # traced once; it ran once per input
    hits = cache.stats().hit_tokens
    assert hits >= 4 + 2 + 4  # the third call, by the first one's rows
    for sampler in tried:
        model.compile(sampler=sampler(), run_eagerly=True)
        found = run(model, first)
        model.compile(sampler=sampler(), run_eagerly=True)  # a sampler draws anew where it was left
        np.testing.assert_array_equal(found, own(model, first))
    cache.clear()
    cache.resize(11)  # a small pool, with the graphs that were traced
    model.compile(sampler="greedy", run_eagerly=True)
    evicted = cache.stats().evicted_blocks
    for inputs, tokens in zip((first, second, first), (*expected, expected[0]), strict=True):
        np.testing.assert_array_equal(run(model, inputs), tokens)
    assert cache.stats().evicted_blocks > evicted
    assert cache.stats().bypassed_calls == 0
    assert cache.stats().live_blocks == 0
    cache.detach()
    assert not any("call" in vars(layer) for layer in model._flatten_layers())
    again = KVCache(size=64, block_size=4)
    attach(model, again)
    np.testing.assert_array_equal(run(model, first), expected[0])
    assert again.stats().bypassed_calls == 0
    assert again.stats().miss_tokens > 0
    again.detach()
    for mode in MODES:
        proven(TABLE, family, mode)


@pytest.mark.slow
def test_whisper():
    backbone, random = whisper(), np.random.default_rng(0)
    features = random.normal(size=(3, 16, 8)).astype(np.float32)
    features[2] = features[0]
    given = np.arange(12) < np.array([5, 3, 5])[:, None]
    ids = np.where(given, random.integers(1, VOCAB, (3, 12)), 0).astype(np.int32)
    inputs = {"encoder_features": features, "decoder_token_ids": ids, "decoder_padding_mask": given}

    def logits(tokens):
        parts = {
            "encoder_features": features,
            "decoder_token_ids": tokens,
            "decoder_padding_mask": np.ones_like(tokens),
        }
        hidden = backbone({name: tf.constant(part) for name, part in parts.items()})["decoder_sequence_output"]
        return backbone.token_embedding(hidden, reverse=True)

    expected = ids.copy()
    for column in range(3, 12):
        expected[:, column] = np.where(
            given[:, column], expected[:, column], np.argmax(logits(expected[:, :column])[:, -1], -1)
        )
    for size in (64, 11):
        cache = KVCache(size=size, block_size=4)
        attach(backbone, cache)
        for _ in range(2):
            np.testing.assert_array_equal(generate(backbone, inputs)["decoder_token_ids"], expected)
        stop = int(expected[0, 7])
        mask = np.asarray(generate(backbone, inputs, stop_token_ids=[stop])["decoder_padding_mask"])
        first = 5 + expected[0, 5:].tolist().index(stop)
        assert mask[0].tolist() == [True] * (first + 1) + [False] * (11 - first)
        if size == 64:
            assert cache.stats().hit_tokens > 0
            found = [generate(backbone, inputs, sampler=make())["decoder_token_ids"] for make in samplers()]
        cache.detach()
    with pytest.raises(UsageError, match="not attached"):
        generate(backbone, inputs)
    for make, tokens in zip(samplers(), found, strict=True):
        np.testing.assert_array_equal(tokens, _by_hand(make(), logits, ids, given))
    for mode in MODES:
        proven(TABLE, "Whisper", mode)


def _by_hand(sampler, logits, ids, given):
    """KerasHub's own sampler with no cache at all."""
    beams = getattr(sampler, "num_beams", 1)
    width = ids.shape[1]

    def following(prompt, cache, index):
        # Rows lie as row * beams + beam; the encoder's input is the row's.
        tokens = np.asarray(prompt)[:, : int(index)]
        found = np.concatenate([np.asarray(logits(tokens[at::beams]))[:, -1:] for at in range(beams)], axis=1)
        return tf.constant(found.reshape(-1, found.shape[-1])), None, ()

    assert width > given.sum(1).min()
    return np.asarray(sampler(following, tf.constant(ids), cache=(), index=given.sum(1).min(), mask=tf.constant(given)))


def test_the_same_prompt_behind_another_input_is_not_found():
    model, cache = build("BART"), KVCache(size=64, block_size=4)
    attach(model, cache)
    inputs = batch("BART", lengths=(9, 9, 9), width=12)
    ids = np.array(inputs["decoder_token_ids"])
    inputs["decoder_token_ids"] = tf.constant(np.repeat(ids[:1], 3, axis=0))
    run(model, inputs)
    assert cache.stats().hit_tokens == 0  # rows 0 and 2 share an input, but are computed in one step


def test_families_without_an_adapter_are_refused_by_name():
    class Other(keras_hub.models.BartSeq2SeqLM):
        pass

    backbone = build("BART").backbone
    with pytest.raises(InvalidInput, match="Other"):
        attach(Other(backbone, preprocessor=None), KVCache(size=4))
