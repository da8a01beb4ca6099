"""The calls that a model is built from."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from kvcache_core.convolution import context_rows
from kvcache_core.errors import InvalidInput
from kvcache_keras.context import local
from kvcache_keras.kernels import Scoring, plain_attention
from kvcache_keras.recorder import check_query
from kvcache_keras.states import behind_zeros

__all__ = ["attention", "causal_conv1d", "positions", "select_outputs"]

_Tensor = Any


def positions(length: Any) -> _Tensor:
    """Absolute positions of the tokens in this forward pass.

    Args:
        length: T, the input's length; a number, or a scalar tensor in a graph that leaves T open.

    Returns:
        int32 [B, T] inside ``with cache:`` (each row's own), [1, T] = 0 .. T - 1 outside.

    Raises:
        InvalidInput: inside, if ``length`` is a number and not the step's T.
    """
    if local.step is None:
        return tf.range(length)[None]
    inside = local.step.positions
    if isinstance(length, int) and inside.shape[1] not in (None, length):
        raise InvalidInput(f"positions() must be asked for this step's {inside.shape[1]} tokens, got {length}")
    return inside


def attention(
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    *,
    layer: int | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> _Tensor:
    """Causal attention; inside ``with cache:`` over cached and new tokens.

    Args:
        q: [B, T, Hq, D].
        k: [B, T, Hkv, D], Hq a multiple of Hkv; heads are not repeated.
        v: [B, T, Hkv, Dv].
        layer: the layer's own number, 0 .. L - 1; None numbers the calls in their order.
        window: a token sees itself and the ``window`` - 1 tokens before it; None for all.
        scale: factor on the scores; default 1 / sqrt(D).
        softcap: scores become ``softcap * tanh(scores / softcap)``.

    Returns:
        [B, T, Hq, Dv].

    Raises:
        InvalidInput, InvalidType: inside a step, for a layer used twice, or another shape or dtype than the
            cache's.
    """
    scoring = Scoring(window, scale, softcap)
    if local.step is not None:
        return local.step.attend(q, k, v, layer, scoring)
    check_query(q, k, layer)
    return plain_attention(q, k, v, scoring)


def causal_conv1d(
    x: _Tensor, kernel: _Tensor, bias: _Tensor | None = None, *, layer: int | None = None, dilation: int = 1
) -> _Tensor:
    """Convolution over time that sees a token and the ones before it, zeros before the first.

    Inside ``with cache:`` a step's inputs stand behind the last (K - 1) * dilation inputs of their sequence, which are
    the layer's state in the cache.

    Args:
        x: [B, T, C].
        kernel: [K, C, E] as of ``keras.layers.Conv1D``, K at least 2; ``kernel[-1]`` is for the token itself.
        bias: [E], or None.
        layer: the layer's own number, 0 .. L - 1, counted together with the attention layers; None numbers the
            calls in their order.
        dilation: distance between the inputs that one output sees.

    Returns:
        [B, T, E].

    Raises:
        InvalidInput: a kernel of 1; inside a step, a layer used twice, or another shape or dtype than when the model
            was first run.

    Example:
        >>> x = tf.constant([[[1.0], [2.0], [3.0]]])
        >>> causal_conv1d(x, tf.ones((2, 1, 1)))[0, :, 0].numpy().tolist()
        [1.0, 3.0, 5.0]
    """
    x, kernel = tf.convert_to_tensor(x), tf.convert_to_tensor(kernel)
    rows = context_rows(int(kernel.shape[0]), dilation)
    joined = behind_zeros(x, rows) if local.step is None else local.step.with_context(x, rows, layer)
    result = tf.nn.convolution(joined, kernel, padding="VALID", dilations=dilation)
    return result if bias is None else result + tf.convert_to_tensor(bias)


def select_outputs(hidden: _Tensor) -> _Tensor:
    """Keep only what the step needs before an expensive output layer.

    Put it before the final projection: a prefill then computes logits for each row's last token alone. Behind the last
    layer's attention it saves that layer's feed-forward part too.

    Args:
        hidden: [B, T, ...].

    Returns:
        [B, 1, ...] in a step of which only each row's last output is wanted; ``hidden`` otherwise.
    """
    step = local.step
    if step is None or not step.last_only or hidden.shape[1] == 1:
        return hidden
    step.selected = True
    return tf.gather(hidden, step.last_index, axis=1, batch_dims=1)[:, None]
