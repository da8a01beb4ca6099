"""Describing a model: what each of its attention layers would store, and how many token ids it has."""

from __future__ import annotations

import re
from typing import Any

import keras
import tensorflow as tf

from kvcache_core.errors import InvalidInput, InvalidType
from kvcache_core.layout import LayerSpec
from kvcache_keras.context import stepping
from kvcache_keras.kernels import Scoring, plain_attention
from kvcache_keras.states import behind_zeros, note_context
from kvcache_keras.store import dtype_name
from kvcache_keras.tokenmodel import run_model

__all__ = ["Recorder", "check_query", "vocab_size"]

_Tensor = Any


class Recorder:
    """Runs in place of a step while a model is described: notes what each layer would store."""

    last_only = False

    def __init__(self, *, masks_zero: bool = False) -> None:
        self.masks_zero = masks_zero
        self.positions = tf.zeros((1, 1), tf.int32)
        self.layers: dict[int, LayerSpec] = {}
        self.dtype: str | None = None

    def attend(self, q: _Tensor, k: _Tensor, v: _Tensor, layer: int | None, scoring: Scoring) -> _Tensor:
        """Plain attention; the layer's shape is noted."""
        check_query(q, k, layer)
        self._note(layer, k.dtype, LayerSpec.attention(k.shape[2], k.shape[3], v.shape[3], window=scoring.window))
        return plain_attention(q, k, v, scoring)

    def with_context(self, x: _Tensor, rows: int, layer: int | None) -> _Tensor:
        """Zeros before the inputs; the layer's state is noted."""
        self._note(layer, x.dtype, note_context(x, rows, layer))
        return behind_zeros(x, rows)

    def _note(self, layer: int | None, dtype: Any, spec: LayerSpec) -> None:
        layer = len(self.layers) if layer is None else layer
        if layer in self.layers:
            raise InvalidInput(f"layer {layer} was used twice in one step: give each attention call its own layer=")
        name = dtype_name(dtype)
        if self.dtype not in (None, name):
            raise InvalidType(f"all layers must have one K/V dtype, got {self.dtype} and {name} in layer {layer}")
        self.dtype = name
        self.layers[layer] = spec

    def specs(self) -> tuple[LayerSpec, ...]:
        """The layers in order.

        Raises:
            InvalidInput: no attention call was seen, or the layer numbers have gaps.
        """
        if not self.layers:
            raise InvalidInput(
                "the model made no call of kvcache_keras.attention (or causal_conv1d): build its attention layers from "
                "it (or from CachedAttention) to cache them"
            )
        if sorted(self.layers) != list(range(len(self.layers))):
            raise InvalidInput(f"layer numbers must be 0 .. L - 1 without gaps, got {sorted(self.layers)}")
        return tuple(self.layers[layer] for layer in range(len(self.layers)))


def check_query(q: _Tensor, k: _Tensor, layer: int | None) -> None:
    """Check the query against K."""
    name = "" if layer is None else f" of layer {layer}"
    if len(q.shape) != 4 or len(k.shape) != 4:
        raise InvalidInput(f"q, k, v{name} must be [B, T, H, D], got q {tuple(q.shape)}, k {tuple(k.shape)}")
    if q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise InvalidInput(
            f"q{name} must be [B, T, Hq, D] like k, Hq a multiple of its K/V heads; got q {tuple(q.shape)}, k "
            f"{tuple(k.shape)}"
        )


def vocab_size(model: Any, output: _Tensor, recorder: Recorder) -> int | None:
    """The number of token ids: what the first lookup of an absurd id says (on a CPU it fails), or the embedding
    as wide as the output, or the only embedding.
    """
    try:
        with tf.init_scope(), stepping(Recorder(masks_zero=recorder.masks_zero)):
            run_model(model, tf.fill((1, 1), tf.int32.max))
    except tf.errors.InvalidArgumentError as error:
        found = re.search(r"is not in \[0, (\d+)\)", str(error))
        if found:
            return int(found[1])
    sizes = [
        layer.input_dim
        for layer in getattr(model, "_flatten_layers", list)()
        if isinstance(layer, keras.layers.Embedding)
    ]
    if len(output.shape) == 3 and output.shape[-1] in sizes:
        return int(output.shape[-1])
    return sizes[0] if len(sizes) == 1 else None
