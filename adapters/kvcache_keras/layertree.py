"""A Keras model's layers and weights by the attributes that hold them: names that do not count other models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import keras

__all__ = ["own_variables", "walk"]


def walk(model: Any) -> Iterator[tuple[str, Any]]:
    """(dotted name, layer) of the model, ``""``, and of every layer inside it, each once.

    Example:
        >>> import keras
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3), keras.layers.Dense(4)])
        >>> [(name, type(layer).__name__) for name, layer in walk(model)]
        [('', 'Sequential'), ('layers.0', 'Dense'), ('layers.1', 'Dense')]
    """
    seen = {id(model)}
    yield from _walk("", model, seen)
    for layer in model._flatten_layers():
        if id(layer) not in seen and not isinstance(layer, keras.layers.InputLayer):
            seen.add(id(layer))
            yield layer.path or layer.name, layer


def _walk(name: str, layer: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    yield name, layer
    for part, inner in _children(layer):
        if id(inner) not in seen:
            seen.add(id(inner))
            yield from _walk(f"{name}.{part}" if name else part, inner, seen)


def own_variables(layer: Any) -> list[tuple[str, Any]]:
    """(name, variable) of the weights that the layer itself holds; one that is held twice has two names."""
    found = [(name, value) for name, value in _parts(layer) if isinstance(value, keras.Variable)]
    named = {id(variable) for _, variable in found}
    tracked = (*layer._trainable_variables, *layer._non_trainable_variables)
    return found + [(variable.name, variable) for variable in tracked if id(variable) not in named]


def _children(layer: Any) -> Iterator[tuple[str, Any]]:
    for number, inner in enumerate(getattr(layer, "layers", ()) if _is_listed(layer) else ()):
        yield f"layers.{number}", inner
    for name, value in _parts(layer):
        if isinstance(value, keras.layers.Layer):
            yield name, value


def _is_listed(layer: Any) -> bool:
    """Whether its layers stand in a list of Keras's own rather than in attributes."""
    return isinstance(layer, keras.Sequential) or type(layer).__name__ == "Functional" or hasattr(layer, "_functional")


def _parts(layer: Any) -> Iterator[tuple[str, Any]]:
    """Attributes, and what is in lists and dicts among them."""
    for name, value in sorted(vars(layer).items()):
        if name not in _kerass_own() and not name.startswith("_self_"):
            yield from _inside(name.lstrip("_"), value)


def _inside(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    yield name, value
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _inside(f"{name}.{key}", part)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _inside(f"{name}.{number}", part)


@cache
def _kerass_own() -> frozenset[str]:
    """Attributes in which Keras keeps account of a layer."""
    return frozenset((*vars(keras.layers.Layer()), *vars(keras.Model()), "_functional", "_inbound_nodes"))
