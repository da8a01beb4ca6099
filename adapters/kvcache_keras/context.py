"""Which cache and which step this thread is in."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf
from keras.src.backend.common import global_state
from tensorflow.python import pywrap_tfe
from tensorflow.python.eager import record
from tensorflow.python.ops import control_flow_util

__all__ = ["is_symbolic", "is_xla", "local", "not_recording", "outside", "reason_of_scope", "recording", "stepping"]


_EXPORTED = "the model is exported: a saved graph has no host to ask what is cached"
_CALLERS = {
    "keras.src.export.": _EXPORTED,
    "tensorflow.python.saved_model.": _EXPORTED,
    "tensorflow.python.ops.parallel_for.": "tf.vectorized_map makes another graph, without host calls",
}
"""Modules under which no graph is traced as it will run, and why. Nothing tells but who calls."""


class _Local(threading.local):
    """One thread's state. A graph reads it only while it is traced, in the thread that traces it: what changes
    from step to step is in tensors.
    """

    cache: Any = None
    """The cache whose ``with`` block the thread is in."""
    step: Any = None
    """The step (or recording) that the model is being run or traced for."""

    samples: bytes | None = None
    """The digest of the weights' samples, where a graph has taken them already."""
    mode: bytes = b""
    """What layers were switched to when that graph was traced."""


local = _Local()


def recording() -> bool:
    """Whether a ``GradientTape`` records what this thread does."""
    return bool(record.could_possibly_record()) and not pywrap_tfe.TFE_Py_TapeSetIsStopped()


def not_recording() -> Any:
    """A context in which no ``GradientTape`` records."""
    return record.stop_recording()


def is_symbolic() -> bool:
    """Whether Keras only asks for shapes: nothing is computed."""
    return global_state.get_global_attribute("symbolic_scope") is not None


def is_xla() -> bool:
    """Whether a graph is traced that XLA will compile."""
    return not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def reason_of_scope() -> str | None:
    """Why what stands around a call forbids to serve it, or None."""
    if global_state.get_global_attribute("stateless_scope") is not None:
        return "the weights are those of a StatelessScope (stateless_call), not the model's own"
    if is_xla():
        return "XLA compiles the graph around the call (jit_compile=True), and cannot ask the host what is cached"
    return None if tf.executing_eagerly() else _reason_of_callers()


def _reason_of_callers() -> str | None:
    frame = sys._getframe().f_back
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if reason := next((why for start, why in _CALLERS.items() if name.startswith(start)), None):
            return reason
        frame = frame.f_back
    return None


@contextmanager
def stepping(step: Any) -> Iterator[None]:
    """Route ``attention`` and ``positions`` of this thread to ``step``."""
    before, local.step = local.step, step
    try:
        yield
    finally:
        local.step = before


@contextmanager
def outside() -> Iterator[None]:
    """Let models of this thread run as outside any cache."""
    before = local.cache, local.step
    local.cache = local.step = None
    try:
        yield
    finally:
        local.cache, local.step = before
