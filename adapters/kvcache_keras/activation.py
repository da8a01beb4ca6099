"""A layer's results, kept per sample: eager, and in graphs of the user's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state
from tensorflow.python.eager import record

from kvcache_core.activation import Bypassed, RowFormat
from kvcache_core.described import ModuleIdentity
from kvcache_core.errors import InvalidType
from kvcache_core.tree import flatten
from kvcache_core.worth import Worth
from kvcache_keras.context import local, not_recording, reason_of_scope, recording
from kvcache_keras.fingerprint import Fingerprint
from kvcache_keras.graphactivation import ADDED_LOSS, call_in_graph
from kvcache_keras.graphsite import GraphSite
from kvcache_keras.masks import MASKS, carrying, masks_of, unwrapped
from kvcache_keras.portable import export_row, layer_identity, restore_row

if TYPE_CHECKING:
    from kvcache_keras.cache import KVCache

__all__ = ["Site", "call"]

_Tensor = Any
_TRAINING = b"training"


class Site(GraphSite):
    """One attached layer or model."""

    def __init__(self, cache: KVCache, module: Any, *, identity: str | None, **options: Any) -> None:
        super().__init__(cache.sites.entries, module, Worth(auto=cache.bypass_rule == "auto"), **options)
        self._cache = cache
        self.identity = ModuleIdentity(identity, type(module).__name__)
        self._identity = (identity or "").encode()
        self._number = cache.sites.number(module).to_bytes(8, "little")

    def bypass(self, reason: str, *, warn: bool = True) -> None:
        """Count a call that goes past the cache."""
        self._cache.bypass(0, reason, warn=warn)

    # ---- tensors -------------------------------------------------------------------------------

    def is_tensor(self, value: Any) -> bool:
        """Whether it is a tensor or a numpy array."""
        return isinstance(value, np.ndarray) or tf.is_tensor(value)

    def array(self, tensor: _Tensor) -> np.ndarray[Any, Any]:
        """The tensor as numpy."""
        check_dense(tensor)
        array = tensor if isinstance(tensor, np.ndarray) else tensor.numpy()
        return np.ascontiguousarray(array).reshape(tensor.shape)

    def numbers(self, tensor: _Tensor) -> tuple[str, np.ndarray[Any, Any]]:
        """The tensor's dtype by name, and its values [B, ...]."""
        array = np.array(np.asarray(tensor))
        name = array.dtype.name
        if array.dtype.kind == "c":
            array = np.stack([array.real, array.imag], -1)
        return name, array.astype(np.float32) if name in ("bfloat16", "float16") else array

    def precisions(self) -> set[str]:
        """The dtypes of weights, and those that layers compute in."""
        layers = self.module._flatten_layers()
        return {layer.compute_dtype for layer in layers} | {str(weight.dtype) for weight in self.module.variables}

    def may_mix(self) -> bool:
        """No: Keras's layers have the batch in front, and its statistics are used in training only."""
        return False

    def take(self, tensor: _Tensor, rows: Sequence[int]) -> _Tensor:
        """Rows of a tensor [B, ...]."""
        return tensor[rows] if isinstance(tensor, np.ndarray) else tf.gather(tensor, np.asarray(rows, np.int32))

    def copies(self, tensor: _Tensor) -> list[tuple[_Tensor, int]]:
        """Each row as an array of its own (a view would keep its whole batch in memory), and its bytes."""
        array = np.asarray(tensor)
        size = array.nbytes // max(1, len(array))
        return [(np.array(row), size) for row in array]

    def stack(self, rows: Sequence[_Tensor]) -> _Tensor:
        """Rows as one new tensor [B, ...]."""
        return tf.convert_to_tensor(np.stack(rows))

    # ---- what the result depends on ------------------------------------------------------------

    @property
    def weights(self) -> Fingerprint:
        """What notices changed weights."""
        return self._cache.weights_of(self.module)

    def namespace(self) -> bytes:
        """What stands for the weights as they are now, the module, the salt."""
        portable = None if self.entries.below is None else self.portable()
        fields = (self._state(), self._number, self._identity, self._cache.salt, self._cache.epoch)
        if portable is not None:
            fields = (*portable, self._cache.epoch, b"", b"")
        return b"".join(len(field).to_bytes(4, "little") + field for field in fields)

    def _state(self) -> bytes:
        """What stands for the weights as they are now, in this process."""
        return self.weights.digest() if local.samples is None else local.samples

    def portable(self) -> tuple[bytes, bytes] | None:
        """What stands for the layer with its weights in any process, and the salt; None if nothing does."""
        if self.mode().removesuffix(_TRAINING) != self.weights.mode():
            return None  # a graph that was traced when layers were switched otherwise
        weights = self.identity.of(self._state() + self.mode() + self._cache.epoch, lambda: layer_identity(self.module))
        return None if weights is None else (weights, self._cache.salt)

    def row_format(self) -> RowFormat:
        """How a row becomes bits and a row again."""
        return export_row, restore_row

    def mode(self) -> bytes:
        """What layers are switched to; all else of how the module computes is among its arguments (``training``).

        One that does not take ``training`` hands on what is said of the call around it.
        """
        if local.samples is not None:
            return local.mode
        handed_on = not self.module._call_has_training_arg and bool(training_of({}))
        return self.weights.mode() + _TRAINING * handed_on

    def reason_to_bypass(self, leaves: Sequence[_Tensor], training: Any) -> str | None:
        """Why a call must be computed as outside, or None."""
        if recording():
            if record.should_record_backprop([leaf for leaf in leaves if tf.is_tensor(leaf)]):
                return "an input needs gradients"
            if self.module.trainable_variables:
                return "the module is being trained; set trainable=False to use the cache"
        if tf.is_tensor(training):
            return "training is a tensor"
        if training and self.module.trainable_variables:
            return "the module is called with training=True and is not frozen"
        layers = self.module._flatten_layers()
        if any(layer._seed_generators and _draws(layer, training) for layer in layers):
            return "the module draws random numbers"
        if any(getattr(layer, "stateful", False) for layer in layers):
            return "a layer keeps a state from call to call"
        return None

    def compute(
        self, original: Callable[..., Any], args: Any, kwargs: Any, leaves: Sequence[_Tensor]
    ) -> tuple[Any, str]:
        """Run the module; its result is nothing that a gradient flows through."""
        before = (
            [variable.numpy() for variable in self.module.non_trainable_variables] if kwargs.get("training") else []
        )
        with not_recording():
            output = original(*args, **kwargs)
        if any(
            not np.array_equal(one, two.numpy())
            for one, two in zip(before, self.module.non_trainable_variables, strict=False)
        ):
            return output, "the module changed its own weights while it computed"
        if any(layer._losses for layer in self.module._flatten_layers()):
            return output, ADDED_LOSS
        return output, ""


def call(cache: KVCache, site: Site, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The attached layer inside ``with cache:``."""
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    training = training_of(kwargs)
    if kwargs.get("training") is False and not any(map(_trains_unless_told, site.module._flatten_layers())):
        del kwargs["training"]  # the same as nothing
    try:
        leaves, tree = flatten((args, kwargs), site.is_tensor)
        for leaf in leaves:
            check_dense(leaf)
        reason = site.reason_to_bypass(leaves, training)
    except InvalidType as error:
        cache.bypass(0, f"an input cannot be hashed: {error}")
        return original(*args, **kwargs)
    is_expected = reason is not None
    reason = reason or reason_of_scope()
    if reason is not None:
        cache.bypass(0, reason, warn=not is_expected)
        return original(*args, **kwargs)
    run = carrying(original, site.is_tensor)
    given = kwargs
    if masks := masks_of(leaves):
        given = {**kwargs, MASKS: masks}
        leaves, tree = flatten((args, given), site.is_tensor)
    if tf.executing_eagerly():
        result, served = cache.serve(site, run, args, given)
        return unwrapped(result, site.is_tensor) if served or result is not None else original(*args, **kwargs)
    try:
        return unwrapped(call_in_graph(site, run, leaves, tree), site.is_tensor)
    except Bypassed as bypassed:
        cache.bypass(0, bypassed.reason, warn=not bypassed.expected)
        return original(*args, **kwargs)


def check_dense(tensor: _Tensor) -> None:
    """Raise InvalidType for a tensor that has no rows of equal size, or no numbers."""
    if isinstance(tensor, tf.RaggedTensor | tf.SparseTensor) or getattr(tensor, "dtype", None) in (
        tf.string,
        tf.variant,
    ):
        raise InvalidType(f"a tensor must be dense numbers to be split into samples, got {type(tensor).__name__}")


def training_of(kwargs: Any) -> Any:
    """What a layer's call, or else the one around it, says of ``training``; None if nothing."""
    given, context = kwargs.get("training"), global_state.get_global_attribute("current_call_ctx")
    if given is not None or context is None:
        return given
    return context.get_value("training") if hasattr(context, "get_value") else context.training


def _draws(layer: Any, training: Any) -> bool:
    """Whether a layer that has a generator draws from it. Those that Keras wrote draw in training only."""
    if not type(layer).__module__.startswith(("keras.", "keras_hub.")):
        return True
    return _trains_unless_told(layer) if training is None else bool(training)


def _trains_unless_told(layer: Any) -> bool:
    """Whether a layer augments at random unless it is told ``training=False``, as ``RandomFlip`` does."""
    return bool(layer._seed_generators) and _trains_by_default(type(layer))


@functools.cache
def _trains_by_default(kind: type[keras.Layer]) -> bool:
    parameter = inspect.signature(kind.call).parameters.get("training")
    return parameter is not None and parameter.default is True
