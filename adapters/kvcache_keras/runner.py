"""The graphs that run a model's steps: one for a prompt, one for a token, whatever the lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from kvcache_core.plan import StepPlan
from kvcache_keras.context import outside, stepping
from kvcache_keras.greedy import choose_greedily
from kvcache_keras.kernels import dimensions, reshape
from kvcache_keras.packing import blocks_read, in_buckets, pack, shared_cuts, signature
from kvcache_keras.step import Step
from kvcache_keras.store import TensorStore
from kvcache_keras.tokenmodel import run_model

__all__ = ["StepRunner", "build", "last_of", "one_token", "place", "target_scores", "to_numpy", "widened"]

_Tensor = Any

_LOOP = 32
"""Tokens that a compiled loop has room for at least: what `generate` asks for at once. Its last loop is shorter, and
would be compiled once more."""


class StepRunner:
    """Runs plans through graphs that are traced once each.

    Attributes:
        traces: how often each graph was traced, by name.
        compiled: whether XLA compiles the steps of one token per row, and loops of them.
    """

    def __init__(self, model: Any, store: TensorStore, dtype: str, frames: int | None = None) -> None:
        self._model = model
        self._frames = None if frames is None else (frames, dtype)
        self._store = store
        self._dtype = dtype
        self._functions: dict[str, Any] = {}
        self.traces: Counter[str] = Counter()
        self.compiled = False
        self._kinds = [kind for kind, _ in store.layout.groups]
        self._kv_kinds = [kind for kind in self._kinds if kind != "output"]

    def anew(self) -> StepRunner:
        """The same with no graph traced yet."""
        runner = StepRunner(self._model, self._store, self._dtype, None if self._frames is None else self._frames[0])
        runner.compiled = self.compiled
        return runner

    def run(self, plan: StepPlan) -> _Tensor:
        """The output behind each row's last token, [B, 1, ...]; the store's copies come first."""
        self.copy(plan)
        if plan.tokens.shape[1] > 1:
            return self.function("prefill")(*pack(plan, self._store))
        cuts = shared_cuts(plan, self._store)
        if self.compiled and not cuts[0]:
            return self.function("compiled")(*in_buckets(pack(plan, self._store)))[: len(plan.rows)]
        return self.function("decode", len(cuts[0]))(*pack(plan, self._store, cuts))

    def run_all(self, plan: StepPlan, slots: NDArray[np.int32]) -> _Tensor:
        """Store the outputs of the new tokens; returns those at ``slots`` [B, T] of the output layer, [B, T, ...]."""
        self.copy(plan)
        return self.function("outputs")(slots, *pack(plan, self._store))

    def run_every(self, plan: StepPlan, name: str, *inputs: NDArray[Any]) -> Any:
        """What is wanted behind every new token: ``"logits"``, ``"greedy"`` tokens, or ``"scores"`` of targets."""
        self.copy(plan)
        return self.function(name)(*inputs, *pack(plan, self._store))

    def choose(self, plan: StepPlan, eos_ids: Collection[int]) -> NDArray[np.int32] | None:
        """Greedy tokens [B, n] of a plan whose rows have N tokens each, all but the first to be chosen; n <= N.

        None if the rows' context, of which the graph makes a copy, is larger than the pool.
        """
        cuts = shared_cuts(plan, self._store)
        name, levels, packed = "loop", len(cuts[0]), pack(plan, self._store, cuts)
        if self.compiled and not levels:
            padded = in_buckets(packed, _LOOP)
            if blocks_read(padded, levels) <= self._store.num_blocks:
                name, packed = "compiled loop", padded
        if blocks_read(packed, levels) > self._store.num_blocks:
            return None
        self.copy(plan)
        chosen, count = self.function(name, levels)(np.array(sorted(eos_ids), np.int32), *packed)
        found: NDArray[np.int32] = chosen.numpy()[: len(plan.rows), : int(count)]
        return found

    def copy(self, plan: StepPlan) -> None:
        """Do the copies a plan asks for."""
        for number, group in enumerate(plan.groups):
            self._store.copy_blocks(number, group.copies)

    def function(self, name: str, levels: int = 0) -> Any:
        """The graph of that name, for steps with so many shared levels; may be called in another graph."""
        key = f"{name}, {levels} shared" if levels else name
        if key not in self._functions:
            with tf.init_scope():
                self._functions[key] = self._make(name, key, levels)
        return self._functions[key]

    def _make(self, name: str, key: str, levels: int) -> Any:
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

        jit = True if name.startswith("compiled") else None
        if name in ("loop", "compiled loop"):

            def choose(eos_ids: _Tensor, *packed: _Tensor) -> tuple[_Tensor, _Tensor]:
                self.traces[key] += 1
                step = Step(self._store, self._dtype, packed, last_only=True, levels=levels)
                return choose_greedily(step, self._run_model, eos_ids, fixed=bool(jit))

            spec = [tf.TensorSpec([None], tf.int32), *signature(self._kv_kinds, size, None, levels=levels)]
            return tf.function(choose, input_signature=spec, autograph=False, jit_compile=jit)

        def run(*packed: _Tensor) -> _Tensor:
            self.traces[key] += 1
            return self._run_model(Step(self._store, self._dtype, packed, last_only=True, levels=levels))

        spec = signature(self._kv_kinds, size, None if name == "prefill" else 1, self._frames, levels=levels)
        return tf.function(run, input_signature=spec, autograph=False, jit_compile=jit)

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


def build(model: Any, frames: int | None = None) -> None:
    """Make the model's variables by a first call on one token: Keras runs parts of it more than once for that."""
    if not model.built:
        with outside():
            run_model(model, one_token(frames))


def one_token(frames: int | None) -> _Tensor:
    """The id 0, [1, 1]; or a frame of zeros, [1, 1, F]."""
    return tf.zeros((1, 1), tf.int32) if frames is None else tf.zeros((1, 1, frames), keras.backend.floatx())


def to_numpy(logits: _Tensor) -> NDArray[Any]:
    """Logits as numpy, half precision widened."""
    result: NDArray[Any] = widened(logits).numpy()
    return result
