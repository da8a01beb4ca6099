"""Noticing that a model's weights changed, without reading all of them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from operator import is_
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.python.eager import context, execute

from kvcache_core.sources import Source
from kvcache_core.weights import ContentSample, digest_of

__all__ = ["SOURCE", "Fingerprint", "source_of"]

SOURCE = "_kvcache_source"
"""The attribute of a variable that a ``ParameterCache`` reads from a file: it is not always in memory."""

_Tensor = Any
_ALL_BELOW = 4096
"""Not in the CPU's memory: a variable of up to so many elements is compared whole."""
_PLACES = 64
"""Elements looked at in a larger one, its first and last among them."""

_numbers = itertools.count(1)


class Fingerprint:
    """Names the state of a model's weights by a number that is never used again.

    TensorFlow has no version counters, but it does not write to memory that somebody holds: an update of a variable
    whose value is held goes to new memory, also one of a single row and one by an optimizer in a graph. So a look
    reads the variables, which copies nothing, and sees whether their memory is the one held since the last look; what
    moved is compared bit by bit. A sample of the content, as in PyTorch, notices who writes to the memory past
    TensorFlow (DLPack). Variables on another device are sampled there. Weights that a ``ParameterCache`` reads stand
    for their file.

    Until the look after it, an update costs the memory of the weights that it changes once more.
    """

    def __init__(self, model: Any, verify: str = "sample") -> None:
        self._verify = verify
        self._lock = threading.Lock()
        self._weights = _weights_of(model)
        self._natives = [_native(weight) for weight in self._weights]
        self._all = [variable for variable in self._natives if isinstance(variable, tf.Variable)]
        self._sources = [source_of(variable) for variable in self._all]
        variables = [one for one, source in zip(self._all, self._sources, strict=True) if source is None]
        self._files = b"".join(source.identity for source in self._sources if source is not None)
        self._here = [one for one in variables if verify == "full" or "CPU" in one.device.upper() or not one.device]
        by_dtype: dict[Any, list[Any]] = {}
        for variable in variables:
            if not any(map(is_, itertools.repeat(variable), self._here)):
                by_dtype.setdefault(variable.dtype, []).append((variable, _places(variable.shape.as_list())))
        self._away = list(by_dtype.values())
        self._handles = [variable.handle for variable in self._here]
        dtypes = tuple(variable.dtype.as_datatype_enum for variable in self._here)
        self._attributes = ("N", len(dtypes), "dtypes", dtypes)
        self._held: list[NDArray[Any]] | None = None

        def sample() -> list[_Tensor]:
            if verify == "never":
                return []
            here = [variable.value() for variable in self._here]
            return here + [tf.concat([_look(*one) for one in group], axis=0) for group in self._away]

        with tf.init_scope():
            # Concrete: a tf.function would look for the graph that fits its arguments at each call; there are none.
            self.sample = tf.function(sample, input_signature=(), autograph=False).get_concrete_function()
        """What a look reads; may be called in a graph, where it costs no host call."""

    def is_of(self, model: Any) -> bool:
        """Whether the model still has the variables this was made for."""
        found = _weights_of(model)
        return (
            len(found) == len(self._weights)
            and all(map(is_, found, self._weights))
            and all(map(is_, map(_native, found), self._natives))
            and all(map(is_, map(source_of, self._all), self._sources))
        )

    def digest(self) -> bytes:
        """Bytes that stand for the weights as they are now."""
        with tf.init_scope():
            return self.digest_of_samples([part._numpy_internal() for part in self._read()])

    def digest_of_samples(self, samples: Sequence[NDArray[Any]]) -> bytes:
        """The same for what a graph has read."""
        if self._verify == "never":
            return self._files
        if self._verify == "full":
            return self._files + digest_of([np.ascontiguousarray(part) for part in samples])
        with self._lock:
            self._compare([np.asarray(part) for part in samples])
            return self._files + self._value

    def _read(self) -> Sequence[_Tensor]:
        if self._away or not self._here or self._verify == "never":
            return self.sample()  # type: ignore[no-any-return]
        # One operation for all: a graph that reads each takes twice as long.
        count = len(self._handles)
        return tuple(execute.execute(b"_ReadVariablesOp", count, self._handles, self._attributes, context.context()))

    def _compare(self, now: list[NDArray[Any]]) -> None:
        """See whether what was read differs from what is held, and hold it."""
        if self._held is None:
            self._changed(now)
            return
        moved = [at for at, same in enumerate(map(np.may_share_memory, self._held, now)) if not same]
        different = any(not np.array_equal(_bits(self._held[at]), _bits(now[at])) for at in moved)
        for at in moved:
            self._held[at] = now[at]
        if different or self._sample.changed():
            self._changed(self._held)
        elif not self._restless.issuperset(moved):
            self._restless.update(moved)
            self._sample = self._new_sample(self._held)

    def _changed(self, now: list[NDArray[Any]]) -> None:
        self._held = now
        self._restless: set[int] = set()
        """What moves though it stays the same: scalars, and variables that a sparse update made copy at each read."""
        self._value = next(_numbers).to_bytes(16, "little")
        self._sample = self._new_sample(now)

    def _new_sample(self, now: list[NDArray[Any]]) -> ContentSample:
        sampled = [part for at, part in enumerate(now[: len(self._here)]) if at not in self._restless and part.ndim]
        rows = [part.shape[-1] if part.ndim > 1 else 1 for part in sampled]
        return ContentSample([part.reshape(-1) for part in sampled], rows)


def source_of(variable: Any) -> Source | None:
    """Where a variable is read from that is not always in memory; None for an ordinary one."""
    return getattr(variable, SOURCE, None)


def _weights_of(model: Any) -> list[Any]:
    weights = list(model.weights)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        weights.append(optimizer.iterations)
    return weights


def _native(weight: Any) -> Any:
    # `_value` is the variable itself; `value` would first ask whether an autocast scope is active.
    return getattr(weight, "_value", weight)


def _bits(array: NDArray[Any]) -> NDArray[np.uint8]:
    return array.reshape(-1).view(np.uint8)


def _look(variable: tf.Variable, places: NDArray[Any] | None) -> _Tensor:
    # Gathering from the variable itself would switch it to copy-on-read for good: every later matmul would copy
    # its weight. Its value is read without a copy.
    value = variable.value()
    if places is not None:
        return tf.gather_nd(value, places)
    return value if value.shape.rank == 1 else tf.reshape(value, (-1,))


def _places(shape: list[int]) -> NDArray[Any] | None:
    """int32 [N, rank] of elements to look at; None: all."""
    size = int(np.prod(shape))
    if size <= _ALL_BELOW:
        return None
    # At random, so that the pattern of a structured change does not fall between the samples.
    flat = np.random.default_rng(size).integers(0, size, _PLACES)
    flat[:2] = 0, size - 1
    return np.stack(np.unravel_index(flat, shape), axis=-1).astype(np.int32)
