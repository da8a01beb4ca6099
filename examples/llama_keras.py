"""A Llama in Keras, to be read in one sitting beside `llama_torch.py`.

Two calls make it ready for a cache and change nothing without one: `positions` instead of `arange`, and
`attention` instead of `dot_product_attention`. Shapes: B batch, T new tokens, C hidden size, H query heads,
G key/value heads, D head size, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from kvcache_keras import attention, positions, select_outputs
from smollm2 import Checkpoint, LlamaConfig

Tensor = Any


def weight(layer: keras.layers.Layer, *shape: int) -> keras.Variable:
    """A weight to be loaded later."""
    return layer.add_weight(shape=shape, initializer="zeros")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, in] times weight [in, out], the order in which Keras keeps it: [N, out]."""
    return tf.matmul(x, weight)


def narrowing(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, in] times a turned weight [out, in]: for few outputs, TensorFlow reads one row's product faster so."""
    return tf.matmul(x, weight, transpose_b=True)


def logits(x: Tensor, table: Tensor) -> Tensor:
    """x [B, T, C] times table [C, V]: [B, T, V]."""
    batch, length, size = ops.shape(x)
    return ops.reshape(linear(ops.reshape(x, (-1, size)), table), (batch, length, table.shape[1]))


def embed(ids: Tensor, table: Tensor) -> Tensor:
    """The columns `ids` [B, T] of table [C, V]: [B, T, C]. The table lies as `logits` reads it fastest."""
    return tf.transpose(tf.gather(table, ids, axis=1), (1, 2, 0))


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last axis."""
    return ops.rms_normalization(x, scale, epsilon=eps)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), in operations that cost less for one row than TensorFlow's own kernel takes to set up."""
    return x / (1 + ops.exp(-x))


def rotary(pos: Tensor, frequencies: Tensor, dtype: Any) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of every angle at positions [B or 1, T]: both [B or 1, T, 1, D]."""
    wide = keras.backend.result_type(dtype, "float32")
    angles = ops.cast(pos[:, :, None, None], wide) * ops.cast(frequencies, wide)
    cos, sin = ops.cast(ops.cos(angles), dtype), ops.cast(ops.sin(angles), dtype)
    return ops.concatenate((cos, cos), -1), ops.concatenate((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of x [B, T, H, D] by its angle."""
    first, second = tf.split(x, 2, axis=-1)
    return x * cos + ops.concatenate((second, first), -1) * sin


class Block(keras.layers.Layer):
    """One decoder layer: [N, C] -> [N, C], N = B * T: the tokens of all rows in one list; the last one's results are
    of the tokens whose logits are wanted.
    """

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.norm1 = weight(self, config.hidden_size)
        self.qkv = weight(self, config.hidden_size, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
        self.out = weight(self, config.hidden_size, config.num_heads * config.head_dim)
        self.norm2 = weight(self, config.hidden_size)
        self.gate_up = weight(self, config.hidden_size, 2 * config.intermediate_size)
        self.down = weight(self, config.hidden_size, config.intermediate_size)
        self.built = True  # else Keras traces the layer three times to find out what to build

    def call(self, x: Tensor, cos: Tensor, sin: Tensor, length: Any) -> Tensor:
        x = x + self.attend(rms_norm(x, self.norm1, self.config.norm_eps), cos, sin, length)
        if self.index == self.config.num_layers - 1:  # behind the last attention a prefill needs each row's last token
            size = self.config.hidden_size
            x = ops.reshape(select_outputs(ops.reshape(x, (-1, length, size))), (-1, size))
        return x + self.feed_forward(rms_norm(x, self.norm2, self.config.norm_eps))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, length: Any) -> Tensor:
        """Grouped-query attention with rotary positions; `length` is T."""
        heads, kv_heads, size = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        qkv = ops.reshape(linear(x, self.qkv), (-1, length, heads + 2 * kv_heads, size))
        qk, v = tf.split(qkv, (heads + kv_heads, kv_heads), axis=2)
        q, k = tf.split(rotate(qk, cos, sin), (heads, kv_heads), axis=2)
        y = attention(q, k, v, layer=self.index)  # [B, T, H, D]
        return narrowing(ops.reshape(y, (-1, heads * size)), self.out)

    def feed_forward(self, x: Tensor) -> Tensor:
        """SwiGLU."""
        gate, up = tf.split(linear(x, self.gate_up), 2, axis=-1)
        return narrowing(silu(gate) * up, self.down)


class Llama(keras.Model):
    """Token ids [B, T] -> logits [B, T, V]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = weight(self, config.hidden_size, config.vocab_size)
        self.blocks = [Block(config, i) for i in range(config.num_layers)]
        self.norm = weight(self, config.hidden_size)
        self.head = self.embed if config.tied else weight(self, config.hidden_size, config.vocab_size)
        self.built = True

    def call(self, x: Tensor) -> Tensor:
        (batch, length), size = ops.shape(x), self.config.hidden_size
        h = ops.reshape(embed(x, self.embed), (-1, size))
        cos, sin = rotary(positions(length), self.config.frequencies, h.dtype)
        for block in self.blocks:
            h = block(h, cos, sin, length=length)
        h = rms_norm(h, self.norm, self.config.norm_eps)
        return logits(ops.reshape(h, (batch, -1, size)), self.head)


def load_weights(model: Llama, weights: dict[str, np.ndarray]) -> Llama:
    """Copy weights, named as in transformers, into `model`; returns it."""

    def fill(variable: keras.Variable, *names: str, turned: bool = False) -> None:
        value = np.concatenate([weights[name + ".weight"] for name in names])  # [out, in], as PyTorch keeps it
        variable.assign(value if turned else value.T)

    fill(model.embed, "model.embed_tokens")
    fill(model.norm, "model.norm")
    if not model.config.tied:
        fill(model.head, "lm_head")
    for i, block in enumerate(model.blocks):
        at = f"model.layers.{i}."
        fill(block.norm1, at + "input_layernorm")
        fill(block.qkv, *(at + f"self_attn.{name}_proj" for name in "qkv"))
        fill(block.out, at + "self_attn.o_proj", turned=True)
        fill(block.norm2, at + "post_attention_layernorm")
        fill(block.gate_up, at + "mlp.gate_proj", at + "mlp.up_proj")
        fill(block.down, at + "mlp.down_proj", turned=True)
    return model


def from_checkpoint(checkpoint: Checkpoint) -> Llama:
    """The model in `checkpoint`, ready to run."""
    return load_weights(Llama(checkpoint.config), checkpoint.weights)
