"""The graphs that run a model's steps: one for a prompt, one for a token, whatever the lengths."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from kvcache_core.plan import StepPlan
from kvcache_keras.context import outside, stepping
from kvcache_keras.greedy import choose_greedily
from kvcache_keras.kernels import dimensions, plain_attention, reshape
from kvcache_keras.states import behind_zeros
from kvcache_keras.step import Step, check_query, pack, signature
from kvcache_keras.store import TensorStore
from kvcache_keras.tokenmodel import run_model

__all__ = [
    "Recompute",
    "StepRunner",
    "build",
    "last_of",
    "one_token",
    "place",
    "recompute_of",
    "recompute_scores_of",
    "to_numpy",
    "widened",
]

_Tensor = Any


class StepRunner:
    """Runs plans through graphs that are traced once each.

    Attributes:
        traces: how often each graph was traced, by name.
    """

    def __init__(self, model: Any, store: TensorStore, dtype: str, frames: int | None = None) -> None:
        self._model = model
        self._frames = None if frames is None else (frames, dtype)
        self._store = store
        self._dtype = dtype
        self._functions: dict[str, Any] = {}
        self.traces: Counter[str] = Counter()
        self._kinds = [kind for kind, _ in store.layout.groups]
        self._kv_kinds = [kind for kind in self._kinds if kind != "output"]

    def run(self, plan: StepPlan) -> _Tensor:
        """The output behind each row's last token, [B, 1, ...]; the store's copies come first."""
        self.copy(plan)
        name = "decode" if plan.tokens.shape[1] == 1 else "prefill"
        return self.function(name)(*pack(plan, self._store))

    def run_all(self, plan: StepPlan, slots: NDArray[np.int32]) -> _Tensor:
        """Store the outputs of the new tokens; returns those at ``slots`` [B, T] of the output layer, [B, T, ...]."""
        self.copy(plan)
        return self.function("outputs")(slots, *pack(plan, self._store))

    def run_every(self, plan: StepPlan, name: str, *inputs: NDArray[Any]) -> Any:
        """What is wanted behind every new token: ``"logits"``, ``"greedy"`` tokens, or ``"scores"`` of targets."""
        self.copy(plan)
        return self.function(name)(*inputs, *pack(plan, self._store))

    def choose(self, plan: StepPlan, eos_ids: Collection[int]) -> NDArray[np.int32]:
        """Greedy tokens [B, n] of a plan whose rows have N tokens each, all but the first to be chosen; n <= N."""
        self.copy(plan)
        ends = np.array(sorted(eos_ids), np.int32)
        chosen: NDArray[np.int32] = self.function("loop")(ends, *pack(plan, self._store)).numpy()
        return chosen

    def copy(self, plan: StepPlan) -> None:
        """Do the copies a plan asks for."""
        for number, group in enumerate(plan.groups):
            self._store.copy_blocks(number, group.copies)

    def function(self, name: str) -> Any:
        """The graph of that name; may be called in another graph."""
        if name not in self._functions:
            with tf.init_scope():
                self._functions[name] = self._make(name)
        return self._functions[name]

    def _make(self, name: str) -> Any:
        size = self._store.layout.block_size
        if name in _EVERY:

            def run_every(*inputs: _Tensor) -> _Tensor:
                self.traces[name] += 1
                extra, packed = inputs[: len(specs)], inputs[len(specs) :]
                return finish(self._run_model(Step(self._store, self._dtype, packed, last_only=False)), *extra)

            finish, specs = _EVERY[name]
            spec = [*specs, *signature(self._kv_kinds, size, None, self._frames)]
            return tf.function(run_every, input_signature=spec, autograph=False)
        if name == "outputs":

            def run_all(slots: _Tensor, *packed: _Tensor) -> _Tensor:
                self.traces[name] += 1
                return self._outputs(slots, Step(self._store, self._dtype, packed, last_only=False))

            spec = [tf.TensorSpec([None, None], tf.int32)]
            spec += signature(self._kinds, size, None, self._frames)
            return tf.function(run_all, input_signature=spec, autograph=False)

        if name == "loop":

            def choose(eos_ids: _Tensor, *packed: _Tensor) -> _Tensor:
                self.traces[name] += 1
                step = Step(self._store, self._dtype, packed, last_only=True)
                return choose_greedily(step, self._run_model, eos_ids)

            spec = [tf.TensorSpec([None], tf.int32), *signature(self._kv_kinds, size, None)]
            return tf.function(choose, input_signature=spec, autograph=False)

        def run(*packed: _Tensor) -> _Tensor:
            self.traces[name] += 1
            return self._run_model(Step(self._store, self._dtype, packed, last_only=True))

        spec = signature(self._kv_kinds, size, 1 if name == "decode" else None, self._frames)
        return tf.function(run, input_signature=spec, autograph=False)

    def _run_model(self, step: Step) -> _Tensor:
        with stepping(step):
            output = run_model(self._model, step.tokens)
        if step.last_only and not step.selected and output.shape[1] != 1:
            output = last_of(output, step.last_index)
        return output

    def _outputs(self, slots: _Tensor, step: Step) -> _Tensor:
        output = self._run_model(step)
        layer = len(self._store.layout.layers) - 1
        array = self._store.array(layer, "output")
        batch, new = dimensions(step.positions)
        step.write(layer, "output", tf.reshape(output, (batch, new, 1, array.shape[2])))
        size = self._store.layout.block_size
        # Padding reads a slot of the null block, which step.write has just set to zero.
        stored = tf.gather_nd(array, tf.stack((slots // size, slots % size), axis=-1))
        return reshape(stored, (*dimensions(slots), *output.shape[2:]))


def widened(logits: _Tensor) -> _Tensor:
    """Half precision as float32."""
    return tf.cast(logits, tf.float32) if logits.dtype in (tf.bfloat16, tf.float16) else logits


def target_scores(logits: _Tensor, targets: _Tensor) -> tuple[_Tensor, _Tensor]:
    """Log-probabilities [B, T] of targets under logits [B, T, V], float64, and the most likely tokens."""
    logits = widened(logits)
    found = tf.gather(logits, targets, axis=2, batch_dims=2)
    scores = tf.cast(found, tf.float64) - tf.cast(tf.reduce_logsumexp(logits, axis=-1), tf.float64)
    return scores, tf.argmax(logits, axis=-1)


# What is made of the logits [B, T, V] behind every new token, and of which inputs besides.
_EVERY: dict[str, tuple[Any, list[tf.TensorSpec]]] = {
    "logits": (lambda logits: logits, []),
    "greedy": (lambda logits: tf.argmax(logits, axis=-1), []),
    "scores": (target_scores, [tf.TensorSpec([None, None], tf.int64)]),
}


def last_of(output: _Tensor, last: _Tensor) -> _Tensor:
    """Each row's output at ``last`` [B]: [B, 1, ...]."""
    return tf.gather(output, last, axis=1, batch_dims=1)[:, None]


def place(output: _Tensor, columns: _Tensor) -> _Tensor:
    """Outputs of aligned rows [B, T, ...] at the columns of the input; zeros at padding."""
    zeros = tf.zeros_like(output[:, :1])
    return tf.gather(tf.concat((output, zeros), axis=1), columns, axis=1, batch_dims=1)


class _Uncached:
    """Stands in for a step where every token is new and none is kept."""

    last_only = True

    def __init__(self, positions: _Tensor, last_index: _Tensor) -> None:
        self.positions = positions
        self.last_index = last_index
        self.selected = False

    def attend(
        self,
        q: _Tensor,
        k: _Tensor,
        v: _Tensor,
        layer: int | None,
        window: int | None,
        scale: float | None,
        softcap: float | None,
    ) -> _Tensor:
        """Plain attention that needs no gradient."""
        check_query(q, k, layer)
        return plain_attention(q, k, v, window, scale, softcap, in_chunks=True)

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


def build(model: Any, frames: int | None = None) -> None:
    """Make the model's variables by a first call on one token: Keras runs parts of it more than once for that."""
    if not model.built:
        with outside():
            run_model(model, one_token(frames))


def one_token(frames: int | None) -> _Tensor:
    """The id 0, [1, 1]; or a frame of zeros, [1, 1, F]."""
    return tf.zeros((1, 1), tf.int32) if frames is None else tf.zeros((1, 1, frames), keras.backend.floatx())


_recomputes: weakref.WeakKeyDictionary[Any, Recompute] = weakref.WeakKeyDictionary()
_recompute_scores: weakref.WeakKeyDictionary[Any, RecomputeScores] = weakref.WeakKeyDictionary()


def recompute_of(model: Any) -> Recompute:
    """The model's graph without a cache, kept as long as the model."""
    if model not in _recomputes:
        build(model)
        _recomputes[model] = Recompute(model)
    return _recomputes[model]


def recompute_scores_of(model: Any) -> RecomputeScores:
    """The model's scoring graph without a cache, kept as long as the model."""
    if model not in _recompute_scores:
        build(model)
        _recompute_scores[model] = RecomputeScores(model)
    return _recompute_scores[model]


def to_numpy(logits: _Tensor) -> NDArray[Any]:
    """Logits as numpy, half precision widened."""
    result: NDArray[Any] = widened(logits).numpy()
    return result
