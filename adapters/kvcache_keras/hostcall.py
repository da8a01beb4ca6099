"""Functions of the host that a graph calls, and that end with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.func_graph import FuncGraph

from kvcache_core.errors import UsageError

__all__ = ["held_by_graph"]

_HELD = "_kvcache_host_calls"


def held_by_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """What to hand to ``tf.numpy_function`` in the place of ``function``, which the graph being traced then holds.

    TensorFlow keeps what it is handed until the process ends, and so would keep the cache, the model and its weights.
    """
    graph = tf.compat.v1.get_default_graph()
    while isinstance(graph, FuncGraph):  # of a graph inside another one, only the outer one is sure to stay
        setattr(graph, _HELD, [*getattr(graph, _HELD, ()), function])
        graph = graph.outer_graph
    held = weakref.ref(function)

    def call(*arrays: Any) -> Any:
        there = held()
        if there is None:
            raise UsageError("a tf.function that used the cache is gone, and its graph still runs: keep the function")
        return there(*arrays)

    return call
