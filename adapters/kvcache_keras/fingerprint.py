"""Noticing that a model's weights changed, without reading all of them."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter, is_, methodcaller
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tensorflow.core.framework import resource_handle_pb2, tensor_pb2

from kvcache_core.sources import Source
from kvcache_core.switches import Switches
from kvcache_core.weights import ContentSample, digest_of

__all__ = ["SOURCE", "Fingerprint", "Structure", "source_of"]

SOURCE = "_kvcache_source"
"""The attribute of a variable that a ``ParameterCache`` reads from a file: it is not always in memory."""

_Tensor = Any
_ALL_BELOW = 4096
"""Not in the CPU's memory: a variable of up to so many elements is compared whole."""
_PLACES = 64
"""Elements looked at in a larger one, its first and last among them."""

_LOOKS = 64
"""So many looks meet every row of the weights: who writes past TensorFlow is rare, and reading takes long already."""
_KEPT = 64
"""So many models are read by an operation: what TensorFlow makes of one, 10 KB for each variable, it never frees."""
_reads = itertools.count()

_may_share_memory = getattr(np.may_share_memory, "_implementation", np.may_share_memory)
"""Without numpy's call of Python for each pair, which asks whether a class of arrays has a function of its own."""

_value_of = attrgetter("_value")
"""A weight's variable itself; ``value`` would first ask whether an autocast scope is active."""

_source_in = methodcaller("get", SOURCE)
"""As :func:`source_of`, of a variable's ``vars``: without a call of Python for each."""

_numbers = itertools.count(1)
_OF_EVERY_LAYER = frozenset(vars(keras.layers.Layer())) | {"call"}


class Fingerprint:
    """Names the state of a model's weights by a number that is never used again.

    TensorFlow has no version counters, but it does not write to memory that somebody holds: an update of a variable
    whose value is held goes to new memory, also one of a single row and one by an optimizer in a graph. So a look
    reads the variables, which copies nothing, and sees whether their memory is the one held since the last look; what
    moved is compared bit by bit. A sample of the content, as in PyTorch, notices who writes to the memory past
    TensorFlow (DLPack). Variables on another device are sampled there. Weights that a ``ParameterCache`` reads stand
    for their file.

    :meth:`mode` says what the layers are switched to besides: an adapter by its name, for example. A graph computes
    with what they were switched to when it was traced.

    Until the look after it, an update costs the memory of the weights that it changes once more.
    """

    def __init__(self, model: Any, verify: str = "sample") -> None:
        self._verify = verify
        self._lock = threading.Lock()
        self._structure = Structure(model)
        values = {id(one): one for one in map(_value_of, [*self._structure.tracked, *model.weights])}
        self._all = [one for one in values.values() if isinstance(one, tf.Variable)]
        self._sources = [source_of(variable) for variable in self._all]
        self._attributes = list(map(vars, self._all))
        variables = [one for one, source in zip(self._all, self._sources, strict=True) if source is None]
        self._files = b"".join(source.identity for source in self._sources if source is not None)
        self._here = [one for one in variables if verify == "full" or _on_cpu(one)]
        by_dtype: dict[Any, list[Any]] = {}
        for variable in variables:
            if not any(map(is_, itertools.repeat(variable), self._here)):
                by_dtype.setdefault(variable.dtype, []).append((variable, _places(variable.shape.as_list())))
        self._away = list(by_dtype.values())
        self._bits = [_bits_of(variable.dtype) for variable in self._here] + [_bits_of(dtype) for dtype in by_dtype]
        self._held: list[NDArray[Any]] | None = None
        self._read_all = _one_read(variables) if verify != "never" and all(map(_on_cpu, variables)) else None

    @functools.cached_property
    def sample(self) -> Callable[[], Sequence[_Tensor]]:
        """What a look reads; may be called in a graph, where it costs no host call."""

        def values() -> list[_Tensor]:
            if self._verify == "never":
                return []
            here = [variable.value() for variable in self._here]
            return here + [tf.concat([_look(*one) for one in group], axis=0) for group in self._away]

        return _graph(values)

    def is_of(self, model: Any) -> bool:
        """Whether the model still has the variables this was made for."""
        return self._structure.is_of(model) and all(map(is_, map(_source_in, self._attributes), self._sources))

    def mode(self) -> bytes:
        """What the layers are switched to, besides their weights; empty if to what they were first."""
        return b"" if self._verify == "never" else self._structure.mode()

    def moved(self) -> bool:
        """Whether a variable differs from what the last look found; no look at what is written past TensorFlow."""
        if self._verify == "never" or self._held is None:
            return False
        with tf.init_scope():
            samples = self._read()  # with no lock: a host call that waited for it would keep a thread of TensorFlow's
        with self._lock:
            moved = self._elsewhere(self._held, samples)
            return any(not np.array_equal(self._held[at], now) for at, now in moved)

    def digest(self) -> bytes:
        """Bytes that stand for the weights as they are now."""
        with tf.init_scope():
            return self.digest_of_samples(self._read())

    def digest_of_samples(self, samples: Sequence[_Tensor]) -> bytes:
        """The same for what a graph has read: tensors in memory, or numpy arrays."""
        if self._verify == "never":
            return self._files
        if self._verify == "full":
            shapes = repr([variable.shape.as_list() for variable in self._here]).encode()
            self._held = list(self._arrays(samples))
            return self._files + shapes + digest_of(self._held)
        with self._lock:
            self._compare(samples)
            return self._files + self._value

    def _read(self) -> Sequence[NDArray[Any]]:
        """What a look reads."""
        found = None if self._read_all is None else self._read_all()
        return list(self._arrays(self.sample())) if found is None else found

    def _arrays(self, samples: Sequence[_Tensor]) -> Iterator[NDArray[Any]]:
        # A tensor's buffer is its memory: no copy, and with no dtype that numpy might not know.
        return map(np.frombuffer, samples, self._bits)

    def _elsewhere(self, held: Sequence[NDArray[Any]], samples: Sequence[_Tensor]) -> list[tuple[int, NDArray[Any]]]:
        """What was read from other memory than what is held, with its number."""
        pairs = map(_may_share_memory, held, samples)
        return [(at, np.frombuffer(samples[at], self._bits[at])) for at, same in enumerate(pairs) if not same]

    def _compare(self, samples: Sequence[_Tensor]) -> None:
        """See whether what was read differs from what is held, and hold it."""
        if self._held is None:
            self._changed(list(self._arrays(samples)))
            return
        moved = dict(self._elsewhere(self._held, samples))
        different = any(not np.array_equal(self._held[at], now) for at, now in moved.items())
        for at, now in moved.items():
            self._held[at] = now
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
        sampled = [at for at, one in enumerate(self._here) if at not in self._restless and one.shape.rank]
        rows = [self._here[at].shape[-1] or 1 if self._here[at].shape.rank > 1 else 1 for at in sampled]
        return ContentSample([now[at] for at in sampled], rows, _LOOKS)


class Structure:
    """Which variables a model has and what its layers are switched to: what a graph traced of it goes by."""

    def __init__(self, model: Any) -> None:
        self.tracked = _tracked(model)
        self._natives = list(map(_value_of, self.tracked))
        layers = (layer for layer in model._flatten_layers() if not type(layer).__module__.startswith("keras."))
        others = [vars(layer) for layer in layers]
        # TensorFlow's own accounts of what to save come late into a layer: some have them, some do not.
        accounts = {name for attributes in others for name in attributes if name.startswith("_self_")}
        self._switches = Switches(others, _OF_EVERY_LAYER | accounts)

    def is_of(self, model: Any) -> bool:
        """Whether the model still has the variables this was made for."""
        found = _tracked(model)
        return (
            len(found) == len(self.tracked)
            and all(map(is_, found, self.tracked))
            and all(map(is_, map(_value_of, found), self._natives))
        )

    def mode(self) -> bytes:
        """What the layers are switched to; empty if to what they were first."""
        return self._switches.mode()


def source_of(variable: Any) -> Source | None:
    """Where a variable is read from that is not always in memory; None for an ordinary one."""
    return getattr(variable, SOURCE, None)


def _tracked(model: Any) -> list[Any]:
    """What each layer keeps account of, and so all weights: Keras's own list of these takes five times as long."""
    found: list[Any] = []
    for layer in model._flatten_layers():
        found += layer._trainable_variables
        found += layer._non_trainable_variables
    optimizer = getattr(model, "optimizer", None)
    return found if optimizer is None else [*found, optimizer.iterations]


def _on_cpu(variable: tf.Variable) -> bool:
    return "CPU" in variable.device.upper() or not variable.device


def _graph(function: Callable[[], Any]) -> Any:
    with tf.init_scope():
        # Concrete: a tf.function would look for the graph that fits its arguments at each call; there are none.
        return tf.function(function, input_signature=(), autograph=False).get_concrete_function()


def _one_read(variables: Sequence[tf.Variable]) -> Callable[[], Sequence[NDArray[Any]] | None] | None:
    """A function that gives the memory of all variables, or None where TensorFlow does not find them by name.

    To read takes less time than what TensorFlow does for each argument and each result of a call. So the graph finds
    the variables by name and hands their memory to numpy itself. It runs in the calling thread: one of TensorFlow's own
    might wait for a lock that the caller holds. Where it does not (eager execution set to asynchronous), it gives None.
    """
    if next(_reads) >= _KEPT:
        return None
    here = threading.local()

    def take(*memory: NDArray[Any]) -> list[Any]:
        here.found = memory
        return []

    def hand_over(values: Sequence[_Tensor]) -> None:
        tf.numpy_function(take, values, ())  # no result: to convert one takes its time, too

    def read() -> Sequence[NDArray[Any]] | None:
        here.found = None
        tf.raw_ops.StatefulPartitionedCall(args=(), Tout=(), f=graph)
        found, here.found = here.found, None  # held by nobody else
        return found  # type: ignore[no-any-return]

    try:
        with tf.init_scope():
            names = list(map(_name_of, variables))
            graph = _graph(lambda: hand_over(list(map(_read_by_name, variables, names))))
            return None if read() is None else read
    except (DecodeError, tf.errors.OpError):
        return None


def _name_of(variable: tf.Variable) -> Any:
    """The ``container`` and the ``name`` by which TensorFlow finds a variable."""
    # A handle tells them only when it is serialized: behind its length, which ends with the first byte below 128.
    serialized = tf.io.serialize_tensor(variable.handle).numpy()
    content = tensor_pb2.TensorProto.FromString(serialized).tensor_content
    start = next((at for at, byte in enumerate(content, 1) if byte < 128), 0)
    return resource_handle_pb2.ResourceHandleProto.FromString(content[start:])


def _read_by_name(variable: tf.Variable, name: Any) -> _Tensor:
    with tf.device(variable.device):
        handle = tf.raw_ops.VarHandleOp(
            dtype=variable.dtype, shape=variable.shape, container=name.container, shared_name=name.name
        )
        return tf.raw_ops.ReadVariableOp(resource=handle, dtype=variable.dtype)


def _bits_of(dtype: tf.DType) -> np.dtype[Any]:
    return np.dtype(f"u{min(8, dtype.size)}")


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
