"""``ParameterCache`` for Keras models: weights are read from a file when their layer runs."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import record
from tensorflow.python.framework import func_graph
from tensorflow.python.ops import resource_variable_ops

from kvcache_core.errors import InvalidInput, InvalidType, UsageError
from kvcache_core.parameters import ParameterFrontend
from kvcache_core.sources import ModelTensor, ModelUnit, Source
from kvcache_core.weightfile import write_weights
from kvcache_keras.context import not_recording, recording
from kvcache_keras.fingerprint import SOURCE
from kvcache_keras.layertree import own_variables, walk

__all__ = ["ParameterCache", "empty_weights", "values_of"]

_Tensor = Any


class ParameterCache(ParameterFrontend):
    """Runs a Keras model whose weights do not fit in memory, for inference: eager and in graphs.

    See :class:`kvcache_core.parameters.ParameterFrontend` for the arguments. A model that was made under
    :func:`empty_weights` never had its weights in memory. Weights are named by the attributes that hold them, such as
    ``blocks.3.qkv``. A graph that uses the model may run in one thread at a time.

    Example:
        >>> import tempfile, keras, numpy as np
        >>> def build():
        ...     return keras.Sequential([keras.Input((8,)), keras.layers.Dense(8), keras.layers.Dense(8)])
        >>> model, x = build(), np.ones((1, 8), "float32")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     expected = model(x)
        ...     ParameterCache.save(model, f"{folder}/model.safetensors")
        ...     parameters = ParameterCache(f"{folder}/model.safetensors", memory=300)  # one layer's 288 bytes
        ...     model = parameters.attach(model)
        ...     bool((model(x) == expected).numpy().all()), parameters.stats().bytes_read
        (True, 576)
    """

    @staticmethod
    def save(model: Any, path: str | os.PathLike[str]) -> None:
        """Write a model's weights as a safetensors file under the names that :meth:`attach` looks for.

        Raises:
            OSError: it cannot be written.
        """
        tensors: dict[int, tuple[str, str, np.ndarray[Any, Any]]] = {}
        for name, layer in walk(model):
            for own, variable in own_variables(layer):
                if id(variable) not in tensors:
                    values = np.asarray(variable.numpy())
                    dtype = keras.backend.standardize_dtype(variable.dtype)
                    tensors[id(variable)] = _join(name, own), dtype, values.view(f"u{values.dtype.itemsize}")
        write_weights(path, {name: (dtype, values) for name, dtype, values in tensors.values()})

    def _modules(self, model: Any) -> list[Any]:
        if not isinstance(model, keras.layers.Layer):
            raise InvalidType(f"kvcache_keras attaches a Keras model or layer, got {type(model).__name__}")
        return [layer for _, layer in walk(model)]

    def _units(self, model: Any) -> list[ModelUnit]:
        if not model.built:
            raise UsageError("the model has no weights yet: build it or call it once before attach()")
        layers = [(name, layer, own_variables(layer)) for name, layer in walk(model)]
        names: dict[int, list[str]] = {}
        variables: dict[int, Any] = {}
        for name, _, own in layers:
            for short, variable in own:
                names.setdefault(id(variable), []).append(_join(name, short))
                variables[id(variable)] = variable
        tensors = {key: _described(variable, tuple(names[key])) for key, variable in variables.items()}
        units, covered = [], set()
        for name, layer, own_names in layers:
            if id(layer) in covered:
                continue
            own = own_names
            if isinstance(layer, self._whole):
                inside = list(walk(layer))
                covered |= {id(part) for _, part in inside}
                own = [found for _, part in inside for found in own_variables(part)]
            if own:
                units.append(ModelUnit(name, layer, tuple(tensors[id(variable)] for _, variable in own)))
        return units

    def _install(self, model: Any, units: Sequence[ModelUnit]) -> None:
        self._was = {name: source.tensor.handle.trainable for name, source in self._sources.items()}
        self._graphs = GraphHolds(self)
        for source in self._sources.values():
            source.tensor.handle.trainable = False
            setattr(_native(source), SOURCE, source)
            self._drop(source)
        self._calls = [HeldCall(self, unit.name, unit.module) for unit in units]
        for call in self._calls:
            call.install()
        self._supports_jit = model.supports_jit
        model.supports_jit = False  # XLA cannot read a file

    def _uninstall(self) -> None:
        for call in reversed(self._calls):
            call.uninstall()
        for name, source in self._sources.items():
            delattr(_native(source), SOURCE)
            source.tensor.handle.trainable = self._was[name]
        self.model.supports_jit = self._supports_jit

    def _load(self, source: Source) -> None:
        with tf.init_scope(), not_recording():
            _assign(_native(source), values_of(source))

    def _drop(self, source: Source) -> None:
        # Of a rank that no operation takes for the weight's: what is used without having been read raises.
        shape = (0, 0) if len(source.tensor.shape) == 1 else (0,)
        with tf.init_scope(), not_recording():
            _assign(_native(source), tf.zeros(shape, _native(source).dtype))


class HeldCall:
    """Stands in for a layer's ``call``: its weights are there while it runs."""

    def __init__(self, parameters: ParameterCache, unit: str, layer: Any) -> None:
        self.parameters, self.unit, self.layer = parameters, unit, layer
        self.original = layer.call
        self._before = vars(layer).get("call")

    def install(self) -> None:
        """Put this in the place of ``layer.call``; straight into the instance: Keras would track it."""
        vars(self.layer)["call"] = self

    def uninstall(self) -> None:
        """Give the layer its own ``call`` back."""
        if self._before is None:
            del vars(self.layer)["call"]
        else:
            vars(self.layer)["call"] = self._before

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise UsageError("the model's weights are in a file; call the ParameterCache's detach() before copying it")

    def __reduce__(self) -> Any:
        raise UsageError("the model's weights are in a file; call the ParameterCache's detach() before saving it")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's call."""
        inputs = [leaf for leaf in tf.nest.flatten((args, kwargs)) if tf.is_tensor(leaf)]
        training = kwargs.get("training")
        if training is not None and (tf.is_tensor(training) or training):
            raise UsageError(
                "weights that are read from a file cannot be trained; call the model without training=True"
            )
        if recording() and record.should_record_backprop(inputs):
            raise UsageError(
                "an input needs gradients, and the weights to compute them with are dropped behind the forward pass"
            )
        if not tf.executing_eagerly():
            return self._in_graph(inputs, args, kwargs)
        self.parameters.hold(self.unit)
        try:
            return self.original(*args, **kwargs)
        finally:
            self.parameters.let_go(self.unit)

    def _in_graph(self, inputs: Sequence[_Tensor], args: Any, kwargs: Any) -> Any:
        """While the graph runs: first the inputs, then the weights, then the layer, then whatever comes behind it."""
        holds = self.parameters._graphs
        with holds.entered(self.unit, inputs) as (hold, let_go):
            with tf.control_dependencies([hold]):
                outputs = self.original(*args, **kwargs)
            released = let_go([leaf for leaf in tf.nest.flatten(outputs) if tf.is_tensor(leaf)])
            with tf.control_dependencies([released]):
                return tf.nest.map_structure(lambda leaf: tf.identity(leaf) if tf.is_tensor(leaf) else leaf, outputs)


class GraphHolds:
    """What graphs hold while they run. A graph that raised lets go when it runs the next time.

    Attributes:
        held: {number of a graph: (depth, unit) of each module that is running in it, outermost first}.
    """

    def __init__(self, parameters: ParameterCache) -> None:
        self._parameters = weakref.proxy(parameters)
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._count = itertools.count()
        self._latest: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._local = threading.local()
        self.held: dict[int, list[tuple[int, str]]] = {}

    @contextmanager
    def entered(self, unit: str, inputs: Sequence[_Tensor]) -> Iterator[tuple[_Tensor, Callable[..., _Tensor]]]:
        """While a layer is traced: the operation that holds its weights, and a function that makes the other one."""
        graph = tf.compat.v1.get_default_graph()
        depth = getattr(self._local, "depth", 0)
        outer = graph
        while getattr(outer, "outer_graph", None) is not None and isinstance(outer.outer_graph, func_graph.FuncGraph):
            outer = outer.outer_graph  # loops and branches belong to the graph around them
        number = self._numbers.setdefault(outer, next(self._count))

        def operation(host: Callable[..., None], after: Sequence[Any]) -> _Tensor:
            latest = self._latest.get(graph)  # one after the other, also where no data flows between them
            before = [] if latest is None else [graph.get_operation_by_name(latest)]
            with tf.control_dependencies([*after, *before]):
                done = tf.py_function(lambda: host(number, depth, unit) or True, [], tf.bool)
            self._latest[graph] = done.op.name
            return done

        hold = operation(self._hold, inputs)
        self._local.depth = depth + 1
        try:
            yield hold, lambda after: operation(self._let_go, after)
        finally:
            self._local.depth = depth

    def _hold(self, number: int, depth: int, unit: str) -> None:
        self._let_go(number, depth, unit)
        self._parameters.hold(unit)
        self.held.setdefault(number, []).append((depth, unit))

    def _let_go(self, number: int, depth: int, unit: str) -> None:
        held = self.held.get(number, [])
        while held and held[-1][0] >= depth:
            self._parameters.let_go(held.pop()[1])


@contextmanager
def empty_weights() -> Iterator[None]:
    """Models made here get variables without values: nothing is allocated until a :class:`ParameterCache` reads them.

    Example:
        >>> import keras
        >>> from kvcache_keras import empty_weights
        >>> with empty_weights():
        ...     layer = keras.layers.Dense(4)
        ...     layer.build((None, 8))
        >>> tuple(layer.kernel.shape)
        (8, 4)
    """

    def create(make: Callable[..., Any], **options: Any) -> Any:
        initial = options["initial_value"]
        if not callable(initial) or not tf.as_dtype(options["dtype"]).is_floating:
            return make(**options)
        with func_graph.FuncGraph("shape").as_default():
            shape = initial().shape
        return resource_variable_ops.UninitializedVariable(
            shape=shape, dtype=options["dtype"], trainable=options["trainable"], name=options["name"]
        )

    with tf.variable_creator_scope(create):
        yield


def values_of(source: Source) -> _Tensor:
    """A copy of a weight's values, in the variable's dtype."""
    bits = source.file.bits(source.name)
    values = bits.view(tf.as_dtype(source.file.entries[source.name].dtype).as_numpy_dtype).reshape(bits.shape)
    return tf.cast(tf.convert_to_tensor(values), _native(source).dtype)


def _native(source: Source) -> tf.Variable:
    return source.tensor.handle._value


def _assign(variable: tf.Variable, value: _Tensor) -> None:
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)


def _described(variable: Any, names: tuple[str, ...]) -> ModelTensor:
    shape = tuple(variable.shape)
    if not isinstance(variable._value, tf.Variable):
        raise InvalidInput(f"weight {names[0]!r} has no values yet: build the model before attach()")
    return ModelTensor(names, shape, int(np.prod(shape)) * variable._value.dtype.size, variable)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
