"""Keras layers for functional and subclassed models."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from kvcache_core.errors import InvalidInput
from kvcache_keras.attention import attention, positions

__all__ = ["CachedAttention", "PositionIds"]

_Tensor = Any


@keras.saving.register_keras_serializable(package="kvcache_keras")
class PositionIds(keras.layers.Layer):
    """The absolute position of every token, for models with learned positions: [B, T, ...] -> int32 [B or 1, T].

    Example:
        >>> ids = keras.Input((None,), dtype="int32")
        >>> h = keras.layers.Embedding(100, 8)(ids) + keras.layers.Embedding(64, 8)(PositionIds()(ids))
    """

    def call(self, x: _Tensor) -> _Tensor:
        """int32 [B or 1, T]."""
        length = x.shape[1] if x.shape[1] is not None else tf.shape(x)[1]
        return positions(length)

    def compute_output_spec(self, x: Any) -> keras.KerasTensor:
        """Keras asks when a functional model is built."""
        return keras.KerasTensor((None, x.shape[1]), dtype="int32")


@keras.saving.register_keras_serializable(package="kvcache_keras")
class CachedAttention(keras.layers.Layer):
    """Causal self-attention with its projections: [B, T, C] -> [B, T, C].

    Inside ``with cache:`` it attends over cached and new tokens; outside it trains as any layer.

    Args:
        num_heads: query heads.
        head_dim: size of a query and key head.
        num_kv_heads: K/V heads, a divisor of ``num_heads``; default ``num_heads``.
        value_dim: size of a value head; default ``head_dim``.
        window: a token sees itself and the ``window`` - 1 tokens before it; default all.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        use_bias: whether the projections have biases.
        rope_theta: base of rotary positions (halves turned, as in Llama); default none.
        layer: the layer's own number, 0 .. L - 1; default the order of the calls.

    Example:
        >>> layer = CachedAttention(num_heads=4, head_dim=8, num_kv_heads=2, rope_theta=10000.0)
        >>> layer(keras.ops.ones((2, 5, 16))).shape
        TensorShape([2, 5, 16])
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        value_dim: int | None = None,
        window: int | None = None,
        softcap: float | None = None,
        use_bias: bool = False,
        rope_theta: float | None = None,
        layer: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.value_dim = head_dim if value_dim is None else value_dim
        self.window = window
        self.softcap = softcap
        self.use_bias = use_bias
        self.rope_theta = rope_theta
        self.layer = layer
        if min(num_heads, head_dim, self.num_kv_heads, self.value_dim) < 1 or num_heads % self.num_kv_heads:
            raise InvalidInput(
                "heads and sizes must be at least 1 and num_heads a multiple of num_kv_heads; got "
                f"num_heads={num_heads}, head_dim={head_dim}, num_kv_heads={self.num_kv_heads}, "
                f"value_dim={self.value_dim}"
            )
        if rope_theta is not None and head_dim % 2:
            raise InvalidInput(f"rotary positions turn pairs: head_dim must be even, got {head_dim}")

    def build(self, input_shape: Any) -> None:
        """Make the projections."""
        width = input_shape[-1]
        sizes = {
            "query": self.num_heads * self.head_dim,
            "key": self.num_kv_heads * self.head_dim,
            "value": self.num_kv_heads * self.value_dim,
        }
        for name, size in sizes.items():
            setattr(self, name, self._dense(name, size, input_shape))
        self.out = self._dense("out", width, (*input_shape[:-1], self.num_heads * self.value_dim))
        self.built = True

    def call(self, x: _Tensor) -> _Tensor:
        """[B, T, C] -> [B, T, C]."""
        length = x.shape[1] if x.shape[1] is not None else ops.shape(x)[1]
        q = ops.reshape(self.query(x), (-1, length, self.num_heads, self.head_dim))
        k = ops.reshape(self.key(x), (-1, length, self.num_kv_heads, self.head_dim))
        v = ops.reshape(self.value(x), (-1, length, self.num_kv_heads, self.value_dim))
        if self.rope_theta is not None:
            cos, sin = self._turn(positions(length), q.dtype)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        y = attention(q, k, v, layer=self.layer, window=self.window, softcap=self.softcap)
        return self.out(ops.reshape(y, (-1, length, self.num_heads * self.value_dim)))

    def compute_output_spec(self, x: Any) -> keras.KerasTensor:
        """Keras asks when a functional model is built."""
        return keras.KerasTensor(x.shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """What a saved model needs to make the layer again."""
        names = (
            "num_heads",
            "head_dim",
            "num_kv_heads",
            "value_dim",
            "window",
            "softcap",
            "use_bias",
            "rope_theta",
            "layer",
        )
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}

    def _dense(self, name: str, size: int, input_shape: Any) -> keras.layers.Dense:
        dense = keras.layers.Dense(size, use_bias=self.use_bias, name=name, dtype=self.dtype_policy)
        dense.build(input_shape)
        return dense

    def _turn(self, where: _Tensor, dtype: Any) -> tuple[_Tensor, _Tensor]:
        """Cosines and sines [B or 1, T, 1, D / 2]; angles in at least float32."""
        wide = "float64" if dtype == "float64" else "float32"
        powers = ops.arange(0, self.head_dim, 2, dtype=wide) / self.head_dim
        angles = ops.cast(where, wide)[:, :, None, None] / self.rope_theta**powers
        return ops.cast(ops.cos(angles), dtype), ops.cast(ops.sin(angles), dtype)


def _rotate(x: _Tensor, cos: _Tensor, sin: _Tensor) -> _Tensor:
    """Turn each pair (i, i + D/2) of x [B, T, H, D] by its angle."""
    first, second = ops.split(x, 2, axis=-1)
    return ops.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
