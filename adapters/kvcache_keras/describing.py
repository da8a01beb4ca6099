"""What a model's layers store, found by running it on one token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tensorflow as tf

from kvcache_core.binding import ModelSpec
from kvcache_core.errors import InvalidInput, KVCacheError
from kvcache_keras.context import not_recording, outside, stepping
from kvcache_keras.probe import check_in_parts
from kvcache_keras.recorder import Recorder, vocab_size
from kvcache_keras.routes import Routes
from kvcache_keras.runner import build, one_token
from kvcache_keras.store import dtype_name
from kvcache_keras.tokenmodel import run_model

if TYPE_CHECKING:
    from kvcache_keras.cache import KVCache

__all__ = ["describe"]


def describe(cache: KVCache, model: Any, routes: Routes | None) -> ModelSpec:
    """Run the model on one token and report what its layers store.

    Args:
        cache: the cache that the model is attached to.
        model: the model.
        routes: of layers of other people: where there are any, more than attention could mix tokens.

    Raises:
        InvalidInput: the model is not one that can be cached.
    """
    with tf.init_scope(), not_recording():
        build(model, cache.frames)
        recorder = Recorder(masks_zero=cache.masks_zero)
        try:
            with stepping(recorder):
                output = run_model(model, one_token(cache.frames))
        except KVCacheError:  # `attention`, `positions` or a layer of Keras's own refused
            cache.saw_attention = True
            raise
        finally:
            cache.saw_attention |= bool(recorder.layers)
    if not tf.is_tensor(output) or output.shape[:2] != (1, 1):
        found = tuple(output.shape) if tf.is_tensor(output) else type(output).__name__
        raise InvalidInput(
            f"a token model must map ids [B, T] or frames [B, T, F] to a tensor [B, T, ...], got {found} for T = 1"
        )
    layers = recorder.specs()
    vocabulary = None if cache.frames else vocab_size(model, output, recorder)
    if routes is not None and routes.methods:
        with tf.init_scope(), not_recording(), outside():
            check_in_parts(model, vocabulary, str(recorder.dtype), cache.frames)
    return ModelSpec(
        layers,
        str(recorder.dtype),
        tuple(output.shape[2:]),
        dtype_name(output.dtype),
        vocabulary,
    )
