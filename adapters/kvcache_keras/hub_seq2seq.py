"""KerasHub's encoder-decoder models: a decoder whose prefix depends on what the encoder has read.

The encoder runs once per input. Its cross-attention K/V are kept with it and lie in variables while a batch decodes;
the decoder's own K/V lie in the cache, under a salt that stands for the input.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kvcache_keras.context import outside
from kvcache_keras.routes import positions_like

__all__ = ["FAMILIES", "Family", "Memory", "memory_of"]

_Tensor = Any
_KEPT = 32
"""Encoder inputs whose cross-attention K/V are kept."""


@dataclass(frozen=True)
class Family:
    """How one family of encoder-decoder models is run.

    Args:
        inputs: names of what the encoder takes, its mask last if it has one.
        encoder: the model's encoder, a function of these inputs: hidden states [B, S, C], or with a mask [B, S].
        layers: the decoder's layers.
        crossing: a decoder layer's cross-attention.
        decode: (backbone, ids [B, T], something in the encoder output's place) -> hidden states [B, T, C].
        cache_parts: how many values the model's ``_build_cache`` returns.
    """

    inputs: tuple[str, ...]
    encoder: Callable[[Any], Callable[..., Any]]
    layers: Callable[[Any], Sequence[Any]]
    crossing: Callable[[Any], Any]
    decode: Callable[[Any, _Tensor, _Tensor], _Tensor]
    cache_parts: int


@dataclass(frozen=True)
class _Input:
    """What is kept of one encoder input: K/V [1, H, S, D] per layer, and what of it is no padding, bool [1, S]."""

    keys: list[_Tensor]
    values: list[_Tensor]
    mask: _Tensor


class Memory:
    """What the decoder's cross-attention sees: encoder inputs, kept by content, and those of the running batch."""

    def __init__(self, model: Any, family: Family) -> None:
        self.lock = threading.RLock()
        """Held while a batch is served: its rows are bound."""
        self.family = family
        self._model = weakref.ref(model)
        self._layers = [family.crossing(layer) for layer in family.layers(_backbone(model))]
        self._kept: OrderedDict[bytes, _Input] = OrderedDict()
        self._bound: list[bytes] = []
        self._encode = tf.function(family.encoder(model), reduce_retracing=True, autograph=False)
        with tf.init_scope():
            self._keys = [_bank(layer, layer._key_dim) for layer in self._layers]
            self._values = [_bank(layer, layer._value_dim) for layer in self._layers]
            self._mask = tf.Variable(tf.ones((1, 1), tf.bool), shape=(None, None), trainable=False)
        for at, layer in enumerate(self._layers):
            _MEMORIES[layer] = self, at

    def close(self) -> None:
        """Forget everything."""
        for layer in self._layers:
            _MEMORIES.pop(layer, None)
        self._kept.clear()

    def digests(self, inputs: dict[str, Any], namespace: bytes) -> list[bytes]:
        """One digest per row of the encoder's inputs; inputs that are not kept are encoded."""
        arrays = [np.ascontiguousarray(inputs[name]) for name in self.family.inputs]
        digests = []
        for row in range(len(arrays[0])):
            digest = hashlib.blake2b(namespace, digest_size=16)
            for array in arrays:
                digest.update(repr((array.shape[1:], array.dtype.str)).encode() + array[row].tobytes())
            digests.append(digest.digest())
            if digests[-1] not in self._kept:
                self._kept[digests[-1]] = self._read(*(tf.constant(array[row : row + 1]) for array in arrays))
            self._kept.move_to_end(digests[-1])
        while len(self._kept) > max(_KEPT, len(set(digests))):
            self._kept.popitem(last=False)
        return digests

    def bind(self, digests: list[bytes]) -> None:
        """Show these inputs to the rows of the next steps; one for all if they are equal."""
        wanted = digests[:1] if len(set(digests)) == 1 else digests
        if wanted == self._bound:
            return
        rows = [self._kept[digest] for digest in wanted]
        for at in range(len(self._layers)):
            self._keys[at].assign(tf.concat([row.keys[at] for row in rows], axis=0))
            self._values[at].assign(tf.concat([row.values[at] for row in rows], axis=0))
        self._mask.assign(tf.concat([row.mask for row in rows], axis=0))
        self._bound = wanted

    def forward(self, tokens: _Tensor) -> _Tensor:
        """Logits [B, T, V] of the decoder for ids [B, T]."""
        backbone = _backbone(self._model())
        width = backbone.token_embedding.output_dim
        # The layers want an encoder output, but what they attend to is here.
        unseen = tf.zeros((tf.shape(tokens)[0], 1, width), backbone.compute_dtype)
        return backbone.token_embedding(self.family.decode(backbone, tokens, unseen), reverse=True)

    def attend(self, at: int, q: _Tensor) -> _Tensor:
        """Cross-attention of layer ``at``: q [B, T, H, D] -> [B, T, H, Dv]."""
        keys, values = self._keys[at].read_value(), self._values[at].read_value()  # B is 1 if all rows see the same
        scale = tf.constant(self._layers[at]._inverse_sqrt_key_dim, q.dtype)
        scores = tf.matmul(tf.transpose(q * scale, (0, 2, 1, 3)), keys, transpose_b=True)
        scores = tf.cast(scores, tf.float32) if scores.dtype.size < 4 else scores
        scores = tf.where(self._mask.read_value()[:, None, None, :], scores, scores.dtype.min)
        y = tf.matmul(tf.cast(tf.nn.softmax(scores), values.dtype), values)
        return tf.transpose(y, (0, 2, 1, 3))

    def _read(self, *arrays: _Tensor) -> _Input:
        with outside():
            encoded = self._encode(*arrays)
            if isinstance(encoded, tuple):
                hidden, mask = encoded
            else:
                hidden, mask = encoded, arrays[1] if len(arrays) > 1 else tf.ones(encoded.shape[:2], tf.bool)
            return _Input(
                [tf.transpose(layer._key_dense(hidden), (0, 2, 1, 3)) for layer in self._layers],
                [tf.transpose(layer._value_dense(hidden), (0, 2, 1, 3)) for layer in self._layers],
                tf.cast(mask, tf.bool),
            )


def _backbone(model: Any) -> Any:
    return getattr(model, "backbone", model)


def _bank(layer: Any, size: int) -> tf.Variable:
    """Room for K or V [B, H, S, D] of one layer."""
    zeros = tf.zeros((1, layer._num_heads, 1, size), layer.compute_dtype)
    return tf.Variable(zeros, shape=(None, layer._num_heads, None, size), trainable=False)


_MEMORIES: weakref.WeakKeyDictionary[Any, tuple[Memory, int]] = weakref.WeakKeyDictionary()


def memory_of(layer: Any) -> tuple[Memory, int] | None:
    """The memory that a cross-attention layer sees, and the layer's number in it."""
    return _MEMORIES.get(layer)


def _bart(backbone: Any, tokens: _Tensor, unseen: _Tensor) -> _Tensor:
    h = backbone.token_embedding(tokens)
    h = backbone.decoder_embeddings_add((h, backbone.decoder_position_embedding(h)))
    h = backbone.decoder_embeddings_layer_norm(h)
    for layer in backbone.decoder_transformer_layers:
        h = layer(h, unseen, training=False)
    return h


def _moonshine(backbone: Any, tokens: _Tensor, unseen: _Tensor) -> _Tensor:
    h = backbone.token_embedding(tokens)
    where = positions_like(tokens)
    rotary = backbone.decoder_rotary_embedding
    angles = tf.reshape(rotary(tf.reshape(where, (-1,))), (*tf.unstack(tf.shape(where)), rotary.rotary_dim))
    angles = tf.ensure_shape(angles, (None, None, rotary.rotary_dim))
    for layer in backbone.decoder_blocks:
        h = layer(h, unseen, rotary_embedding=angles, training=False)
    return backbone.decoder_post_norm(h)


def _whisper(backbone: Any, tokens: _Tensor, unseen: _Tensor) -> _Tensor:
    h = backbone.decoder_embeddings(tokens)
    for layer in backbone.decoder_transformer_layers:
        h = layer(h, unseen, training=False)
    return backbone.decoder_layer_norm(h)


def _whisper_encoder(backbone: Any) -> Callable[..., Any]:
    encoder = keras.Model(backbone.input["encoder_features"], backbone.output["encoder_sequence_output"])
    return lambda features: encoder(features, training=False)


def _own_encoder(model: Any) -> Callable[..., Any]:
    encode: Callable[..., Any] = model.call_encoder
    return encode


FAMILIES = {
    "BartSeq2SeqLM": Family(
        ("encoder_token_ids", "encoder_padding_mask"),
        _own_encoder,
        lambda backbone: backbone.decoder_transformer_layers,
        lambda layer: layer._cross_attention_layer,
        _bart,
        4,
    ),
    "MoonshineAudioToText": Family(
        ("encoder_input_values", "encoder_padding_mask"),
        _own_encoder,
        lambda backbone: backbone.decoder_blocks,
        lambda layer: layer.cross_attention,
        _moonshine,
        5,
    ),
    "WhisperBackbone": Family(
        ("encoder_features",),
        _whisper_encoder,
        lambda backbone: backbone.decoder_transformer_layers,
        lambda layer: layer._cross_attention_layer,
        _whisper,
        0,
    ),
}
