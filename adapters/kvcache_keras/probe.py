"""Before a model of other people's layers is served: does computing it in parts give what computing it whole gives?

Something besides attention may mix tokens (a convolution over time, a recurrent layer, a mean), or count positions from
0 by itself. No list of layers can know; two short runs do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from kvcache_core.errors import InvalidInput
from kvcache_core.mixing import PART_TOLERANCE
from kvcache_keras.context import stepping
from kvcache_keras.kernels import Scoring, causal_mask
from kvcache_keras.routes import here
from kvcache_keras.states import behind_zeros
from kvcache_keras.tokenmodel import FORWARDS, run_model

__all__ = ["check_in_parts"]

_Tensor = Any
_PARTS = (3, 1, 2)


@dataclass(frozen=True)
class _Call:
    """One call of a layer: its inputs [B, T, ...] and its output [B, T, ...]."""

    layer: Any
    inputs: list[NDArray[Any]]
    output: NDArray[Any]


class _Part:
    """Stands in for a step: the new tokens see those of the parts before."""

    last_only = False
    selected = False

    def __init__(self, past: dict[int, tuple[_Tensor, _Tensor]], start: int, count: int) -> None:
        self.positions = tf.range(start, start + count)[None]
        self.last_index = tf.constant([count - 1])
        self.shared: dict[Any, Any] = {}
        self._past = past
        self._layers = 0

    def attend(self, q: _Tensor, k: _Tensor, v: _Tensor, layer: int | None, scoring: Scoring) -> _Tensor:
        """Attention over the past and the new tokens, written out: nothing that it is to check computes it."""
        layer = self._layers if layer is None else layer
        self._layers += 1
        if layer in self._past:
            k, v = (tf.concat((old, new), axis=1) for old, new in zip(self._past[layer], (k, v), strict=True))
        self._past[layer] = k, v
        k, v = (tf.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
        scale = q.shape[3] ** -0.5 if scoring.scale is None else scoring.scale
        scores = tf.einsum("bthd,bshd->bhts", q, k) * tf.constant(scale, q.dtype)
        if scoring.softcap is not None:
            scores = scoring.softcap * tf.tanh(scores / scoring.softcap)
        mask = causal_mask(self.positions, tf.range(k.shape[1])[None], scoring.window)
        weights = tf.nn.softmax(tf.where(mask[:, None], scores, scores.dtype.min))
        return tf.einsum("bhts,bshd->bthd", weights, v)

    def with_context(self, x: _Tensor, rows: int, layer: int | None) -> _Tensor:
        """The inputs of the parts before, and the new ones."""
        layer = self._layers if layer is None else layer
        self._layers += 1
        past = self._past[layer][0] if layer in self._past else behind_zeros(x[:, :0], rows)
        joined = tf.concat((past, x), axis=1)
        self._past[layer] = joined[:, -rows:], joined
        return joined


def check_in_parts(model: Any, vocab_size: int | None, dtype: str, frames: int | None = None) -> None:
    """Raise InvalidInput, naming the layer, if the model computed in parts is another one than computed whole.

    Args:
        model: routed and built; it is called outside any cache.
        vocab_size: ids are below it; None if unknown.
        dtype: of K and V.
        frames: F of a model that takes frames.
    """
    tolerance = PART_TOLERANCE[dtype]
    count = sum(_PARTS)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, max(2, vocab_size or 2), (1, count)).astype(np.int32)
    if frames is not None:
        ids = rng.standard_normal((1, count, frames)).astype(np.float32)
    whole, parts = _whole(model, ids), _in_parts(model, ids)
    if _equal(whole, parts, tolerance):
        return
    raise InvalidInput(
        f"layer {_culprit(model, ids, tolerance)} cannot be served from a cache exactly: computed in parts, its tokens "
        "get another result. It mixes tokens outside attention, or counts positions from 0: take them from "
        "kvcache_keras.positions() or PositionIds"
    )


def _whole(model: Any, ids: NDArray[Any]) -> NDArray[Any]:
    if model in FORWARDS:  # a decoder alone has no way to run but in a step
        return _in_parts(model, ids, (ids.shape[1],))
    return _array(run_model(model, tf.constant(ids)))


def _in_parts(model: Any, ids: NDArray[Any], parts: Sequence[int] = _PARTS) -> NDArray[Any]:
    past: dict[int, tuple[_Tensor, _Tensor]] = {}
    outputs, start = [], 0
    for count in parts:
        with stepping(_Part(past, start, count)):
            tokens = tf.constant(ids[:, start : start + count])
            outputs.append(_array(run_model(model, tokens)))
        start += count
    return np.concatenate(outputs, axis=1)


def _equal(whole: NDArray[Any], parts: NDArray[Any], tolerance: float) -> bool:
    """Whether every token of [B, T, ...] got the same numbers, but for rounding."""
    if whole.shape != parts.shape:
        return False
    size, difference = _size(whole).max(initial=0), _size(whole.astype(np.float64) - parts)
    return bool((difference <= tolerance * max(size, 1e-30)).all())


def _size(x: NDArray[Any]) -> NDArray[np.float64]:
    """Root mean square of each token's numbers: [B, T, ...] -> [B, T]."""
    result: NDArray[np.float64] = np.sqrt(np.square(x, dtype=np.float64).reshape(*x.shape[:2], -1).mean(axis=-1))
    return result


def _culprit(model: Any, ids: NDArray[Any], tolerance: float) -> str:
    """The innermost layer that gets the same and gives something else, else the model."""
    with _recorded(list(model._flatten_layers(include_self=False))) as calls:
        _whole(model, ids)
        whole = [call for call in calls if call.output.shape[1] == ids.shape[1]]
        calls.clear()
        _in_parts(model, ids)
    seen: dict[int, int] = {}
    for call in whole:
        number = seen[id(call.layer)] = seen.get(id(call.layer), -1) + 1
        own = [other for other in calls if other.layer is call.layer]
        pieces = own[number :: max(1, len(own) // len(_PARTS))]
        if len(pieces) == len(_PARTS) and _differs(call, pieces, tolerance):
            return here(call.layer)
    return here(model)


def _differs(whole: _Call, pieces: list[_Call], tolerance: float) -> bool:
    """Whether equal inputs gave another output in pieces; inputs of other shapes in each piece are masks."""
    if any(len(piece.inputs) != len(whole.inputs) for piece in pieces):
        return False
    output = np.concatenate([piece.output for piece in pieces], axis=1)
    for at, expected in enumerate(whole.inputs):
        parts = [piece.inputs[at] for piece in pieces]
        alike = all(part.shape[2:] == expected.shape[2:] for part in parts)
        if alike and not _equal(expected, np.concatenate(parts, axis=1), tolerance):
            return False
    return not _equal(whole.output, output, tolerance)


@contextmanager
def _recorded(layers: list[Any]) -> Iterator[list[_Call]]:
    """Note every call of these layers that maps tokens to tokens."""
    calls: list[_Call] = []

    def recorder(layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            if tf.is_tensor(output) and output.shape.rank and output.shape.rank > 1:
                inputs = [
                    _array(x) for x in (*args, *kwargs.values()) if tf.is_tensor(x) and x.shape[:2] == output.shape[:2]
                ]
                calls.append(_Call(layer, inputs, _array(output)))
            return output

        return recorded

    before = [(layer, vars(layer).get("call")) for layer in layers]
    try:
        for layer in layers:
            vars(layer)["call"] = recorder(layer, layer.call)
        yield calls
    finally:
        for layer, call in before:
            if call is None:
                del vars(layer)["call"]
            else:
                vars(layer)["call"] = call


def _array(x: _Tensor) -> NDArray[Any]:
    result: NDArray[Any] = (tf.cast(x, tf.float32) if x.dtype in (tf.bfloat16, tf.float16) else x).numpy()
    return result
