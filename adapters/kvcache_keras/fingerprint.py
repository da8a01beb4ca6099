"""Noticing that a model's weights changed, without reading all of them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import numpy as np
import tensorflow as tf

from kvcache_core.sources import Source
from kvcache_core.weights import digest_of

__all__ = ["SOURCE", "Fingerprint", "source_of"]

SOURCE = "_kvcache_source"
"""The attribute of a variable that a ``ParameterCache`` reads from a file: it is not always in memory."""

_Tensor = Any
_ALL_BELOW = 4096
"""A variable of up to so many elements is compared whole."""
_SAMPLES = 64
"""Elements looked at in a larger one, its first and last among them."""


class Fingerprint:
    """Samples of a model's weights, and its optimizer's step counter, which moves with every training step.

    Whole updates (``assign``, ``set_weights``, ``load_weights``, an optimizer's step) change samples. A change of a few
    elements of a large weight can be missed: ``cache.invalidate()`` says so by hand. Weights that a ``ParameterCache``
    reads stand for their file.
    """

    def __init__(self, model: Any, verify: str = "sample") -> None:
        self._verify = verify
        self._all = _variables_of(model)
        self._sources = [source_of(variable) for variable in self._all]
        self._variables = [one for one, source in zip(self._all, self._sources, strict=True) if source is None]
        self._files = b"".join(source.identity for source in self._sources if source is not None)
        by_dtype: dict[Any, list[tf.Variable]] = {}
        for variable in self._variables:
            by_dtype.setdefault(variable.dtype, []).append(variable)
        groups = [[(variable, _places(variable.shape.as_list())) for variable in group] for group in by_dtype.values()]

        def sample() -> list[_Tensor]:
            if verify == "never":
                return []
            if verify == "full":
                return [variable.value() for variable in self._variables]
            return [tf.concat([_look(variable, places) for variable, places in group], axis=0) for group in groups]

        with tf.init_scope():
            # Concrete: a tf.function would look for the graph that fits its arguments at each call; there are none.
            self.sample = tf.function(sample, input_signature=(), autograph=False).get_concrete_function()
        """The samples as one tensor per dtype; may be called in a graph, where it costs no host call."""

    def is_of(self, model: Any) -> bool:
        """Whether the model still has the variables this was made for."""
        found = _variables_of(model)
        return (
            len(found) == len(self._all)
            and all(map(is_, found, self._all))
            and all(map(is_, map(source_of, found), self._sources))
        )

    def digest(self) -> bytes:
        """What the samples are now."""
        with tf.init_scope():
            return self.digest_of_samples([part.numpy() for part in self.sample()])

    def digest_of_samples(self, samples: Sequence[np.ndarray[Any, Any]]) -> bytes:
        """The same for samples that a graph has taken."""
        if self._verify == "full":
            return self._files + digest_of([np.ascontiguousarray(part) for part in samples])
        return self._files + b"".join(part.tobytes() for part in samples)


def source_of(variable: Any) -> Source | None:
    """Where a variable is read from that is not always in memory; None for an ordinary one."""
    return getattr(variable, SOURCE, None)


def _variables_of(model: Any) -> list[tf.Variable]:
    variables = list(model.weights)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        variables.append(optimizer.iterations)
    # `_value` is the variable itself; `value` would first ask whether an autocast scope is active.
    found = [getattr(variable, "_value", variable) for variable in variables]
    return [variable for variable in found if isinstance(variable, tf.Variable)]


def _look(variable: tf.Variable, places: np.ndarray[Any, Any] | None) -> _Tensor:
    # Gathering from the variable itself would switch it to copy-on-read for good: every later matmul would copy
    # its weight. Its value is read without a copy.
    value = variable.value()
    if places is not None:
        return tf.gather_nd(value, places)
    return value if value.shape.rank == 1 else tf.reshape(value, (-1,))


def _places(shape: list[int]) -> np.ndarray[Any, Any] | None:
    """int32 [N, rank] of elements to look at; None: all."""
    size = int(np.prod(shape))
    if size <= _ALL_BELOW:
        return None
    # At random, so that the pattern of a structured change does not fall between the samples.
    flat = np.random.default_rng(size).integers(0, size, _SAMPLES)
    flat[:2] = 0, size - 1
    return np.stack(np.unravel_index(flat, shape), axis=-1).astype(np.int32)
