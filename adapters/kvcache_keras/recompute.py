"""Running a model without a cache, in graphs that are traced once each."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from kvcache_keras.context import stepping
from kvcache_keras.fingerprint import Structure
from kvcache_keras.kernels import Scoring, plain_attention
from kvcache_keras.recorder import check_query
from kvcache_keras.runner import build, last_of, target_scores, to_numpy
from kvcache_keras.states import behind_zeros
from kvcache_keras.tokenmodel import run_model

__all__ = ["Recompute", "RecomputeScores", "recompute_of", "recompute_scores_of"]

_Tensor = Any


class _Uncached:
    """Stands in for a step where every token is new and none is kept."""

    last_only = True

    def __init__(self, positions: _Tensor, last_index: _Tensor) -> None:
        self.positions = positions
        self.last_index = last_index
        self.selected = False

    def attend(self, q: _Tensor, k: _Tensor, v: _Tensor, layer: int | None, scoring: Scoring) -> _Tensor:
        """Plain attention that needs no gradient."""
        check_query(q, k, layer)
        return plain_attention(q, k, v, scoring, in_chunks=True)

    def with_context(self, x: _Tensor, rows: int, layer: int | None) -> _Tensor:
        """Zeros before the inputs."""
        return behind_zeros(x, rows)


class Recompute:
    """Runs a model over whole rows without a cache, in one graph for all shapes.

    Attributes:
        traces: how often the graph was traced.
    """

    def __init__(self, model: Any) -> None:
        self.traces = 0
        reference = weakref.ref(model)

        def run(tokens: _Tensor, last: _Tensor) -> _Tensor:
            self.traces += 1
            step = _Uncached(tf.range(tf.shape(tokens)[1])[None], last)
            model = reference()
            with stepping(step):
                output = run_model(model, tokens)
            return output[:, 0] if step.selected else last_of(output, last)[:, 0]

        spec = [tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None], tf.int32)]
        self._function = tf.function(run, input_signature=spec, autograph=False)

    def __call__(self, rows: list[list[int]]) -> NDArray[Any]:
        """Logits [B, V] behind each row's last token."""
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.zeros((len(rows), lengths.max()), np.int32)
        for at, row in enumerate(rows):
            tokens[at, : len(row)] = row
        return to_numpy(self._function(tokens, lengths - 1))


class RecomputeScores:
    """Scores targets behind whole rows without a cache, in one graph for all shapes."""

    def __init__(self, model: Any) -> None:
        reference = weakref.ref(model)

        def run(tokens: _Tensor, targets: _Tensor) -> Any:
            step = _Uncached(tf.range(tf.shape(tokens)[1])[None], None)
            step.last_only = False
            model = reference()
            with stepping(step):
                output = run_model(model, tokens)
            return target_scores(output, targets)

        spec = [tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None, None], tf.int64)]
        self._function = tf.function(run, input_signature=spec, autograph=False)

    def __call__(
        self, rows: list[list[int]], targets: Sequence[Sequence[int]]
    ) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Per row, log-probabilities of the targets behind its last tokens, and the most likely tokens."""
        tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
        wanted = np.zeros(tokens.shape, np.int64)
        for at, (row, behind) in enumerate(zip(rows, targets, strict=True)):
            tokens[at, : len(row)] = row
            wanted[at, len(row) - len(behind) : len(row)] = behind
        scores, chosen = (found.numpy() for found in self._function(tokens, wanted))
        parts = [slice(len(row) - len(behind), len(row)) for row, behind in zip(rows, targets, strict=True)]
        return [(scores[at, part], chosen[at, part]) for at, part in enumerate(parts)]


_Graphs = weakref.WeakKeyDictionary[Any, tuple[Structure, Any]]
_recomputes: _Graphs = weakref.WeakKeyDictionary()
_recompute_scores: _Graphs = weakref.WeakKeyDictionary()


def recompute_of(model: Any) -> Recompute:
    """The model's graph without a cache, kept as long as the model stays as it is."""
    found: Recompute = _graph_of(model, _recomputes, Recompute)
    return found


def recompute_scores_of(model: Any) -> RecomputeScores:
    """The model's scoring graph without a cache, kept as long as the model stays as it is."""
    found: RecomputeScores = _graph_of(model, _recompute_scores, RecomputeScores)
    return found


def _graph_of(model: Any, known: _Graphs, make: Callable[[Any], Any]) -> Any:
    structure, graph = known.get(model, (None, None))
    if structure is None or structure.mode() or not structure.is_of(model):
        build(model)
        graph = make(model)
        known[model] = Structure(model), graph
    return graph
