"""``KVCache`` for Keras models."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from kvcache_core.binding import ModelSpec
from kvcache_core.errors import CacheFull, InvalidInput, InvalidType, UsageError
from kvcache_core.frontend import FrontendCache
from kvcache_core.layout import BlockLayout
from kvcache_core.plan import StepPlan
from kvcache_core.sequence import Sequence as CachedSequence
from kvcache_core.stepping import check_count
from kvcache_core.types import TokenIds
from kvcache_keras.activation import Site
from kvcache_keras.attach import AttachedCall
from kvcache_keras.context import local, not_recording
from kvcache_keras.describing import describe
from kvcache_keras.fingerprint import Fingerprint, source_of
from kvcache_keras.graphcall import PendingCalls
from kvcache_keras.parameters import values_of
from kvcache_keras.routes import Routes
from kvcache_keras.runner import StepRunner, to_numpy, widened
from kvcache_keras.store import TensorStore, stored_dtype_name
from kvcache_keras.tokenmodel import model_input

__all__ = ["KVCache"]

_Tensor = Any


class KVCache(FrontendCache):
    """A K/V cache for one Keras model.

    Inside ``with cache:``, ``model(x)`` gives what it gives outside and skips the tokens whose state is
    cached, also in a ``tf.function`` of your own. See :class:`kvcache_core.frontend.FrontendCache` for the
    arguments and :meth:`attach`.

    A ``tf.function`` that was traced inside ``with cache:`` goes on using the cache wherever it is called.

    Example:
        >>> import keras, tensorflow as tf
        >>> from kvcache_keras import CachedAttention, KVCache
        >>> ids = keras.Input((None,), dtype="int32")
        >>> h = keras.layers.Embedding(10, 8)(ids)
        >>> h = h + CachedAttention(num_heads=2, head_dim=4, rope_theta=10000.0)(h)
        >>> model = keras.Model(ids, keras.layers.Dense(10)(h))
        >>> cache = KVCache(size=64, block_size=4)
        >>> model = cache.attach(model)
        >>> x = tf.range(9)[None]
        >>> with cache:
        ...     first, second = model(x), model(x)
        >>> bool(tf.reduce_all(first[:, :8] == second[:, :8])), cache.stats().hit_tokens
        (True, 8)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pending = PendingCalls()
        self._runner: StepRunner | None = None
        self._traced: tuple[Fingerprint, bytes] | None = None
        self._weights: weakref.WeakKeyDictionary[Any, Fingerprint] = weakref.WeakKeyDictionary()
        self._routes: Routes | None = None
        self._undo: list[Callable[[], Any]] = []

    def _prepare(self) -> None:
        if self._core is None and not tf.executing_eagerly():
            # In a thread of its own: the graph being traced here would take the pool's variables for its own, and
            # be traced twice.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(super()._prepare).result()
        else:
            super()._prepare()

    # ---- what the core asks for ----------------------------------------------------------------

    def _dtype_name(self, dtype: Any) -> str:
        return stored_dtype_name(dtype)

    def _active(self) -> Any:
        return local.cache

    def _set_active(self, cache: Any) -> None:
        local.cache = cache

    def _describe(self, model: Any) -> ModelSpec:
        return describe(self, model, self._routes)

    def _has_embedding(self, model: Any) -> bool:
        layers = model._flatten_layers() if hasattr(model, "_flatten_layers") else []
        if not model.built and any(isinstance(layer, keras.layers.Flatten) for layer in layers):
            return False  # its first call decides its shapes: one token would be the wrong one
        return any(isinstance(layer, keras.layers.Embedding) for layer in layers)

    def _new_site(self, module: Any, **options: Any) -> Site:
        vars(module)["call"].take_samples()
        return Site(self, module, **options)

    def _new_store(self, layout: BlockLayout, num_blocks: int) -> TensorStore:
        return TensorStore(layout, num_blocks)

    def _fingerprint(self, model: Any) -> bytes:
        if local.samples is not None:
            return local.samples + local.mode
        weights = self.weights_of(model)
        state = weights, weights.mode()
        if self._runner is not None and state != self._traced:
            # Its graphs compute with other layers, or with layers switched otherwise.
            self._runner = self._runner.anew()
        self._traced = state
        return weights.digest() + state[1]

    def _weights_changed(self) -> bool:
        self._prepare()
        weights = self.weights_of(self.model)
        return (weights, weights.mode()) != self._traced or weights.moved()

    def _parameters(self, model: Any) -> Iterator[tuple[str, NDArray[Any]]]:
        for weight in {id(weight): weight for weight in model.weights}.values():
            with tf.init_scope():
                source = source_of(weight._value)
                values = np.asarray(keras.ops.convert_to_numpy(weight if source is None else values_of(source)))
            dtype = keras.backend.standardize_dtype(weight.dtype)
            if "float" in dtype:
                yield dtype, values.view(f"u{values.dtype.itemsize}")

    def weights_of(self, model: Any) -> Fingerprint:
        """What notices that the weights of the model, or of an attached part, change; also while it is detached."""
        known = self._weights.get(model)
        if known is None or not known.is_of(model):
            known = self._weights[model] = Fingerprint(model, self.verify)
        return known

    def _install(self, model: Any) -> None:
        if not isinstance(model, keras.layers.Layer):
            raise InvalidType(f"kvcache_keras attaches a Keras model, got {type(model).__name__}")
        self._routes, call = Routes(model), AttachedCall(self, model)
        call.install()
        self._undo = [self._routes.uninstall, call.uninstall]

    def _install_part(self, model: Any) -> None:
        if not isinstance(model, keras.layers.Layer):
            raise InvalidType(f"kvcache_keras attaches a Keras model or layer, got {type(model).__name__}")
        AttachedCall(self, model).install()

    @property
    def masks_zero(self) -> bool:
        """Whether token 0 is padding to the model (``mask_zero=True``): then it has no place in a sequence."""
        return self._routes is not None and self._routes.masks_zero

    def at_detach(self, undo: Callable[[], Any]) -> None:
        """Have ``undo`` called when the model is detached."""
        self._undo.append(undo)

    def _uninstall(self, model: Any) -> None:
        if model is not self.model or not self._undo:
            vars(model)["call"].uninstall()
            return
        self._runner = None
        while self._undo:
            self._undo.pop()()

    def native_ids(self, ids: Any) -> Any:
        """Numpy ids [B, T] as the attached model takes them."""
        return model_input(self.model, tf.constant(ids, tf.int32))

    def check_vocabulary(self, token_ids: Any) -> None:
        """Raise InvalidInput for ids that the model's embedding does not have, or that are padding to it."""
        super().check_vocabulary(token_ids)
        if self.hides(token_ids):
            raise InvalidInput(
                "token 0 is padding to this model (mask_zero=True) and cannot stand in a sequence; leave padding out, "
                "or say with lengths= or mask= where it is"
            )

    def hides(self, token_ids: Any) -> bool:
        """Whether there is a token that the model itself hides."""
        return self.masks_zero and not np.asarray(token_ids).all()

    # ---- running the model ---------------------------------------------------------------------

    @property
    def runner(self) -> StepRunner:
        """The graphs that run the attached model's steps."""
        store = self.store
        with self._prepare_lock:
            if self._runner is None:
                self._runner = StepRunner(self.model, store, self.spec.dtype, self.frames)
            return self._runner

    def compile(self) -> None:
        """Let XLA compile the decode steps of the attached model, and its loops of greedy ones, in padded shapes.

        Rows, context and loops are padded to powers of two; each new shape takes seconds at its first step. Rows that
        share enough to read it once run as before.

        Raises:
            UsageError: no model is attached, it has state layers, or its weights are not always in memory.
        """
        self._check_attached()
        if any(source_of(weight._value) is not None for weight in self.model.weights):
            raise UsageError("weights that a ParameterCache reads from a file cannot be compiled into a step")
        if any(kind == "state" for kind, _ in self.store.layout.groups):
            raise UsageError("steps of a model with state layers cannot be compiled: use the cache without compile()")
        self.runner.compiled = True

    def _run_step(self, plan: StepPlan) -> NDArray[Any]:
        with not_recording():
            return to_numpy(self.runner.run(plan)[:, 0])

    def _run_greedy(self, plan: StepPlan) -> NDArray[Any]:
        with not_recording():
            chosen: NDArray[Any] = tf.argmax(self.runner.run(plan)[:, 0], axis=-1).numpy()
        return chosen

    def decode_greedy(
        self,
        seqs: Sequence[CachedSequence],
        token_ids: Sequence[TokenIds],
        count: int,
        eos_ids: Collection[int] = (),
    ) -> NDArray[np.int64]:
        """As :meth:`FrontendCache.decode_greedy`, in one graph that returns to Python when all is done.

        The graph works on a copy of the rows' context. Where that would be larger than the pool itself, and where
        there is no room for all ``count`` tokens, the steps are run one by one.
        """
        check_count(count)
        if any(kind == "state" for kind, _ in self.store.layout.groups):
            return super().decode_greedy(seqs, token_ids, count, eos_ids)  # a state is behind all of a step's tokens
        if any(len(ids) != 1 for ids in token_ids):
            first = self.step_greedy(seqs, token_ids)[:, None]
            if count == 1 or np.isin(first, list(eos_ids)).any():
                return first
            try:
                more = self.decode_greedy(seqs, first.tolist(), count - 1, eos_ids)
            except CacheFull:
                return first
            return np.concatenate((first, more), axis=1)
        if self._weights_changed():
            self.refresh()
        for ids in token_ids:
            self.check_vocabulary(ids)
        try:
            plan = self.core.plan(seqs, [[*ids, *[0] * (count - 1)] for ids in token_ids])
        except CacheFull:
            if count == 1:
                raise
            return super().decode_greedy(seqs, token_ids, count, eos_ids)
        try:
            with not_recording():
                found = self.runner.choose(plan, eos_ids)
        except BaseException:
            self.core.rollback(plan)
            raise
        if found is None:
            self.core.rollback(plan)
            return super().decode_greedy(seqs, token_ids, count, eos_ids)
        chosen = found.astype(np.int64)
        self.core.commit(plan, [[*ids, *row[:-1]] for ids, row in zip(token_ids, chosen.tolist(), strict=True)])
        return chosen

    def _run_all(self, plan: StepPlan) -> NDArray[Any]:
        with not_recording():
            return to_numpy(self.runner.run_every(plan, "logits"))

    def _run_greedy_all(self, plan: StepPlan) -> NDArray[Any]:
        with not_recording():
            chosen: NDArray[Any] = self.runner.run_every(plan, "greedy").numpy()
        return chosen

    def _run_top(self, plan: StepPlan, count: int) -> tuple[NDArray[Any], NDArray[Any]]:
        with not_recording():
            logits = widened(self.runner.run(plan)[:, 0])
            best, tokens = tf.math.top_k(logits, min(count, logits.shape[-1]))
            scores = tf.cast(best, tf.float64) - tf.cast(tf.reduce_logsumexp(logits, -1, keepdims=True), tf.float64)
        return scores.numpy(), tokens.numpy()

    def _run_scores(self, plan: StepPlan, targets: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        with not_recording():
            scores, chosen = self.runner.run_every(plan, "scores", targets)
        return scores.numpy(), chosen.numpy()
