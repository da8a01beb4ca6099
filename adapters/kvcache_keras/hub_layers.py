"""How KerasHub's layers are served: by class name, so that nothing here imports KerasHub.

A layer's own ``call`` runs, with its projections, norms and rotary embedding; only the positions and the product of
query, key and value come from the cache. Written against KerasHub 0.32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops

from kvcache_core.errors import InvalidInput
from kvcache_keras.attention import attention, select_outputs
from kvcache_keras.context import local
from kvcache_keras.hub_seq2seq import memory_of
from kvcache_keras.routes import Route, here, positions_like

__all__ = ["LOGITS", "ROUTES"]

_Tensor = Any
_Given = dict[str, Any]


# ---- positions ---------------------------------------------------------------------------------------


def _with_positions(layer: Any, original: Callable[..., Any], given: _Given) -> _Tensor:
    """Layers that take ``positions=`` and count from 0 without it."""
    return original(given["inputs"], positions=positions_like(given["inputs"]))


def _rotary(layer: Any, original: Callable[..., Any], given: _Given) -> _Tensor:
    """The layer's own turn, at the step's positions; sines are computed once for all layers that turn alike."""
    x = given["inputs"]
    shared = getattr(local.step, "shared", {})
    config = {name: value for name, value in layer.get_config().items() if name not in ("name", "trainable")}
    key = ("rotary", type(layer), repr(config), len(x.shape), x.shape[-1])
    if key not in shared:
        shared[key] = layer._compute_cos_sin_embedding(x, positions=positions_like(x))
    return layer._apply_rotary_pos_emb(x, *shared[key])


def _refuse_axes(layer: Any) -> str | None:
    if (layer.sequence_axis, layer.feature_axis) == (1, -1):
        return None
    return f"its axes are ({layer.sequence_axis}, {layer.feature_axis}), the cache's are (1, -1)"


def _refuse_dynamic(layer: Any) -> str | None:
    return "its angles depend on the length of the whole sequence, so that a longer one would need other keys"


# ---- attention ---------------------------------------------------------------------------------------


def _grouped(scale: str, groups: str | None, window: Callable[[Any], int | None]) -> Callable[..., _Tensor]:
    """Serve a ``_compute_attention(query, key, value, ...)`` whose K/V heads were repeated before."""

    def serve(layer: Any, original: Callable[..., Any], given: _Given) -> _Tensor:
        q, k, v = given["query"], given["key"], given["value"]
        repeats = getattr(layer, groups) if groups else 1
        if repeats > 1:
            k, v = k[:, :, ::repeats], v[:, :, ::repeats]
        return attention(q, k, v, scale=getattr(layer, scale), window=window(layer))

    return serve


def _no_window(layer: Any) -> None:
    return None


def _gemma(layer: Any, original: Callable[..., Any], given: _Given) -> _Tensor:
    size = layer.head_dim if layer.query_head_dim_normalize else layer.hidden_dim // layer.num_query_heads
    return attention(
        given["q"],
        given["k"],
        given["v"],
        scale=size**-0.5,
        window=layer.sliding_window_size if layer.use_sliding_window_attention else None,
        softcap=layer.logit_soft_cap,
    )


def _refuse_bidirectional(layer: Any) -> str | None:
    return "its tokens see what comes after them" if layer.use_bidirectional_attention else None


def _cached_multi_head(layer: Any, original: Callable[..., Any], given: _Given) -> _Tensor:
    x = given["query"]
    if given["value"] is not x:
        return _cross(layer, layer._query_dense(x))
    y = attention(layer._query_dense(x), layer._key_dense(x), layer._value_dense(x), scale=layer._inverse_sqrt_key_dim)
    return layer._output_dense(y)


def _cross(layer: Any, q: _Tensor) -> _Tensor:
    found = memory_of(layer)
    if found is None:
        raise InvalidInput(f"layer {here(layer)} cannot be served from a cache exactly: it is cross-attention")
    memory, at = found
    return layer._output_dense(memory.attend(at, q))


def _moonshine(layer: Any, original: Callable[..., Any], given: _Given) -> _Tensor:
    """``rotary_embedding`` holds angles [B or 1, T, R] for the first R numbers of a head, in pairs of neighbours."""
    x, angles = given["query"], given.get("rotary_embedding")
    if given["value"] is not x:
        return _cross(layer, layer._query_dense(x))
    q, k = layer._query_dense(x), layer._key_dense(x)
    q = _turn_neighbours(q, angles)
    if layer.apply_rotary_embedding:
        k = _turn_neighbours(k, angles)
    return layer._output_dense(attention(q, k, layer._value_dense(x), scale=layer._inverse_sqrt_key_dim))


def _turn_neighbours(x: _Tensor, angles: _Tensor) -> _Tensor:
    """Turn pairs (2i, 2i + 1) of x [B, T, H, D] by angles [B or 1, T, R], R <= D."""
    size = angles.shape[-1]
    angles = angles[:, :, None]
    turned, rest = x[..., :size], x[..., size:]
    across = tf.reshape(tf.stack((-turned[..., 1::2], turned[..., ::2]), axis=-1), tf.shape(turned))
    return tf.concat((tf.cast(turned * tf.cos(angles) + across * tf.sin(angles), x.dtype), rest), axis=-1)


# ---- ALiBi -------------------------------------------------------------------------------------------


def _alibi_attention(q: _Tensor, k: _Tensor, v: _Tensor, slopes: Any, scale: float) -> _Tensor:
    """Attention whose scores get ``slopes[h] * position of the key``: one more number in each key and query.

    A query's own position adds the same to all its scores, and a softmax does not see that.
    """
    where = tf.cast(positions_like(k), k.dtype)[:, :, None, None]
    k = tf.concat((k, tf.broadcast_to(where, (*_leading(k), 1))), axis=-1)
    ramp = tf.cast(tf.constant(slopes, tf.float32) / scale, q.dtype)[None, None, :, None]
    q = tf.concat((q, tf.broadcast_to(ramp, (*_leading(q), 1))), axis=-1)
    return attention(q, k, v, scale=scale)


def _leading(x: _Tensor) -> Any:
    return tf.unstack(tf.shape(x)[:-1])


def _bloom(layer: Any, original: Callable[..., Any], given: _Given) -> _Tensor:
    x = given["hidden_states"]
    slopes = layer._alibi_layer._get_slopes(layer.num_heads)
    q, k, v = layer._query_dense(x), layer._key_dense(x), layer._value_dense(x)
    y = _alibi_attention(q, k, v, slopes, layer.inv_norm_factor)
    return layer._output_dense(_join_heads(y))


def _falcon(layer: Any, original: Callable[..., Any], given: _Given) -> _Tensor:
    """Falcon scales the sum of scores and ALiBi; its slopes come with the decoder's ``alibi`` [B, H, 1, T]."""
    x = given["inputs"]
    slopes = _alibi_slopes(layer.num_heads) * layer.inv_norm_factor
    q, k, v = layer.query_dense(x), layer.key_dense(x), layer.value_dense(x)
    return layer.output_dense(_join_heads(_alibi_attention(q, k, v, slopes, layer.inv_norm_factor)))


def _join_heads(y: _Tensor) -> _Tensor:
    batch, length = tf.unstack(tf.shape(y)[:2])
    return tf.ensure_shape(tf.reshape(y, (batch, length, y.shape[2] * y.shape[3])), (*y.shape[:2], None))


def _alibi_slopes(heads: int) -> Any:
    """Slopes of Press et al. 2021, also for head counts that are no power of two."""
    power = 1 << (heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4.0 / power * np.arange(1, 2 * power + 1, 2))
    return np.concatenate((slopes, between[: heads - power]))


# ---- logits ------------------------------------------------------------------------------------------


def _logits(layer: Any, original: Callable[..., Any], given: _Given) -> _Tensor:
    """The language model's last layer: only the rows that are wanted."""
    x = given["inputs"]
    if not given.get("reverse"):
        return original(x)
    hidden = select_outputs(x)
    plain = layer.tie_weights and layer.reverse_dtype is None and layer.quantization_mode is None
    if not plain or hidden.shape[1] != 1:
        return original(hidden, reverse=True)
    # The table on the left: for few rows, TensorFlow reads it several times faster there.
    logits = tf.transpose(tf.matmul(ops.convert_to_tensor(layer.embeddings), hidden[:, 0], transpose_b=True))[:, None]
    cap = layer.logit_soft_cap
    return logits if cap is None else ops.tanh(logits / cap) * cap


_POSITIONS = Route(_with_positions)
_ROTARY = Route(_rotary, refuse=_refuse_axes)


def _attention(groups: str | None, window: Callable[[Any], int | None] = _no_window) -> Route:
    return Route(_grouped("_inv_norm_factor", groups, window), "_compute_attention")


LOGITS = Route(_logits)
"""Of the token embedding of a KerasHub language model, whose reverse is the model's last layer."""

ROUTES: Mapping[str, Route] = {
    "PositionEmbedding": _POSITIONS,
    "SinePositionEncoding": _POSITIONS,
    "RotaryEmbedding": _ROTARY,
    "LlamaRotaryEmbedding": _ROTARY,
    "Phi3SuScaledRotaryEmbedding": Route(_with_positions, refuse=_refuse_dynamic),
    "LlamaAttention": _attention("num_key_value_groups"),
    "CachedMistralAttention": _attention("_num_key_value_groups", lambda layer: layer._sliding_window),
    "CachedMixtralAttention": _attention("num_key_value_groups", lambda layer: layer.sliding_window),
    "QwenAttention": _attention(
        "num_key_value_groups",
        lambda layer: layer.sliding_window_size if layer.use_sliding_window_attention else None,
    ),
    "Qwen3Attention": _attention("num_key_value_groups", lambda layer: layer.sliding_window_size or None),
    "Phi3Attention": _attention("num_key_value_groups"),
    "GPTNeoXAttention": _attention(None),
    "CachedGemmaAttention": Route(_gemma, "_compute_attention"),
    "CachedGemma3Attention": Route(_gemma, "_compute_attention"),
    "Gemma3DecoderBlock": Route(lambda layer, original, given: original(**given), refuse=_refuse_bidirectional),
    "CachedMultiHeadAttention": Route(_cached_multi_head),
    "MoonshineMultiHeadAttention": Route(_moonshine),
    "BloomAttention": Route(_bloom),
    "FalconAttention": Route(_falcon),
}
