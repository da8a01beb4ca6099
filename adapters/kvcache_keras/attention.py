"""The calls that a model is built from."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from kvcache_core.errors import InvalidInput
from kvcache_keras.context import local
from kvcache_keras.kernels import plain_attention
from kvcache_keras.step import check_query

__all__ = ["attention", "positions", "select_outputs"]

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
    if local.step is not None:
        return local.step.attend(q, k, v, layer, window, scale, softcap)
    check_query(q, k, layer)
    return plain_attention(q, k, v, window, scale, softcap)


def select_outputs(hidden: _Tensor) -> _Tensor:
    """Keep only what the step needs before an expensive output layer.

    Put it before the final projection: a prefill then computes logits for each row's last token alone.

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
