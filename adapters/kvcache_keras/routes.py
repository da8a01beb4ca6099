"""Layers of a model that people did not write for the cache: while it is attached, their attention goes through it.

A layer keeps its own ``call``; outside a step of the cache it runs untouched. Inside one, attention layers hand their
query, key and value to :func:`kvcache_keras.attention`, and layers that know positions take them from
:func:`kvcache_keras.positions`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from kvcache_core.errors import InvalidInput
from kvcache_keras.attention import attention, positions
from kvcache_keras.context import local

__all__ = ["Route", "RoutedMethod", "Routes", "here", "is_routed", "positions_like"]

_Tensor = Any


@dataclass(frozen=True)
class Route:
    """How one class of layers is served.

    Args:
        serve: takes (layer, the layer's own method, its arguments by name); what the method returns inside a step.
        method: the method it stands in for.
        refuse: says why a layer of this class cannot be served exactly, or None.
    """

    serve: Callable[[Any, Callable[..., Any], dict[str, Any]], Any]
    method: str = "call"
    refuse: Callable[[Any], str | None] = lambda layer: None


class RoutedMethod:
    """Stands in for one method of one layer. Copies and pickles as the layer's own."""

    def __init__(self, layer: Any, route: Route) -> None:
        self.layer = layer
        self.route = route
        self.original = getattr(layer, route.method)
        self._parameters = list(_parameters(type(layer), route.method))
        vars(layer)[route.method] = self  # past Keras, which would track it

    def uninstall(self) -> None:
        """Give the layer its own method back."""
        del vars(self.layer)[self.route.method]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own method, or inside a step the route."""
        if local.step is None:
            return self.original(*args, **kwargs)
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        return self.route.serve(self.layer, self.original, given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _own(memo[id(self.layer)], self.route.method)

    def __reduce__(self) -> Any:
        return _own, (self.layer, self.route.method)


class Routes:
    """The routed layers of one model.

    Args:
        model: any Keras model or layer.

    Raises:
        InvalidInput: a layer that cannot be served exactly, by name.
    """

    def __init__(self, model: Any) -> None:
        self.methods: list[RoutedMethod] = []
        found = list(_routes_in(model))
        layers = model._flatten_layers() if hasattr(model, "_flatten_layers") else ()
        self.masks_zero = bool(found) and any(getattr(layer, "mask_zero", False) for layer in layers)
        for layer, route in found:
            reason = route.refuse(layer)
            if reason:
                raise InvalidInput(f"layer {here(layer)} cannot be served from a cache exactly: {reason}")
        self.methods = [RoutedMethod(layer, route) for layer, route in found]

    def uninstall(self) -> None:
        """Give every layer its own methods back."""
        for method in self.methods:
            method.uninstall()
        self.methods = []


def here(layer: Any) -> str:
    """A layer's name and class, for messages."""
    return f"{getattr(layer, 'path', None) or layer.name!r} ({type(layer).__name__})"


def is_routed(layer: Any) -> bool:
    """Whether the layer's class has a route."""
    return _route_of(type(layer)) is not None


def positions_like(x: _Tensor) -> _Tensor:
    """int32 [B, T]: the positions of x [B, T, ...]."""
    return positions(x.shape[1] if x.shape[1] is not None else ops.shape(x)[1])


# ---- Keras's own attention layers --------------------------------------------------------------------


def _check_self_attention(layer: Any, given: Mapping[str, Any]) -> None:
    """Raise unless the call is causal self-attention and nothing else."""
    query = given["query"]
    reason = None
    if any(other is not None and other is not query for other in (given["value"], given.get("key"))):
        reason = "its query is not also its key and value (cross-attention)"
    elif not given.get("use_causal_mask"):
        reason = "it is called without use_causal_mask=True, so that tokens see what comes after them"
    elif given.get("return_attention_scores"):
        reason = "it is asked for its attention scores"
    elif _masked(given):
        reason = "it is given a mask besides the causal one"
    if reason:
        raise InvalidInput(f"layer {here(layer)} cannot be served from a cache exactly: {reason}")


def _masked(given: Mapping[str, Any]) -> bool:
    """Whether a mask hides more than what comes later; that of ``mask_zero`` hides no token of a sequence."""
    if given.get("attention_mask") is not None:
        return True
    names = ("query_mask", "value_mask", "key_mask")
    implied = any(given.get(name) is not None for name in names) or _has_mask(given["query"])
    return implied and not getattr(local.step, "masks_zero", True)


def _has_mask(x: _Tensor) -> bool:
    return getattr(x, "_keras_mask", None) is not None


def _serve_multi_head(layer: Any, original: Callable[..., Any], given: dict[str, Any]) -> _Tensor:
    return _serve(layer, given, layer._sliding_window, layer._inverse_sqrt_key_dim, gated=layer._use_gate)


def _serve_grouped_query(layer: Any, original: Callable[..., Any], given: dict[str, Any]) -> _Tensor:
    return _serve(layer, given, layer.sliding_window, layer._inverse_sqrt_head_dim, gated=layer.use_gate)


def _serve(layer: Any, given: Mapping[str, Any], window: int | None, scale: float, *, gated: bool) -> _Tensor:
    _check_self_attention(layer, given)
    mask = getattr(given["query"], "_keras_mask", None)
    # With the mask on it, the layers inside would warn that they lose it.
    x = given["query"] if mask is None else tf.identity(given["query"])
    y = attention(layer._query_dense(x), layer._key_dense(x), layer._value_dense(x), window=window, scale=scale)
    y = layer._output_dense(y * layer._gate_dense(x) if gated else y)
    if mask is not None:
        y._keras_mask = mask
    return y


def _refuse_other_axes(layer: Any) -> str | None:
    axes = layer._attention_axes
    return None if axes in (None, (1,)) else f"it attends over axes {axes}, not over tokens"


def _refuse_masking(layer: Any) -> str | None:
    return "which tokens it hides depends on values, not on token ids"


_KERAS = {
    keras.layers.Masking: Route(lambda layer, original, given: original(**given), refuse=_refuse_masking),
    keras.layers.MultiHeadAttention: Route(_serve_multi_head, refuse=_refuse_other_axes),
    keras.layers.GroupQueryAttention: Route(_serve_grouped_query),
}


_COMPUTATION = ("call", "_compute_attention", "_compute_attention_mask", "_compute_causal_mask")
"""What a subclass must have left as it was to be served as its base class is."""


# ---- finding them ------------------------------------------------------------------------------------


def _routes_in(model: Any) -> Iterator[tuple[Any, Route]]:
    """Every layer of the model that has a route."""
    if not hasattr(model, "_flatten_layers"):
        return
    for layer in model._flatten_layers():
        route = _route_of(type(layer))
        if route is not None:
            yield layer, route
    if type(model).__module__.startswith("keras_hub."):
        from kvcache_keras.hub_layers import LOGITS

        embedding = getattr(getattr(model, "backbone", model), "token_embedding", None)
        if type(embedding) is keras.layers.ReversibleEmbedding:
            yield embedding, LOGITS


def _route_of(kind: type) -> Route | None:
    """The route of a layer class: its own, or that of a base class whose computation it has not changed."""
    for base in kind.__mro__:
        route = _KERAS.get(base) or _hub_route(base)
        if route is not None:
            same = all(getattr(kind, name, None) is getattr(base, name, None) for name in {route.method, *_COMPUTATION})
            return route if same else None
    return None


def _hub_route(base: type) -> Route | None:
    if not base.__module__.startswith("keras_hub."):
        return None
    from kvcache_keras.hub_layers import ROUTES

    return ROUTES.get(base.__name__)


def _parameters(kind: type, method: str) -> Iterator[str]:
    """Names of a method's parameters, without self."""
    code = getattr(kind, method).__code__
    yield from code.co_varnames[1 : code.co_argcount]


def _own(layer: Any, method: str) -> Any:
    return types.MethodType(getattr(type(layer), method), layer)
