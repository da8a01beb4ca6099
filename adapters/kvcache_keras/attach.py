"""What stands in for a model's ``call`` while it is attached to a cache."""

from __future__ import annotations

import inspect
import types
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from kvcache_keras import activation
from kvcache_keras.calls import EagerCall, GraphCall
from kvcache_keras.context import is_symbolic, local, reason_of_scope, recording
from kvcache_keras.tokenmodel import takes_token_dict
from kvcache_keras.trainers import keep_apart
from kvcache_keras.transparent import check_frames, check_ids

if TYPE_CHECKING:
    from kvcache_keras.cache import KVCache

__all__ = ["AttachedCall"]

_ROW_ARGUMENTS = ("lengths", "mask", "attention_mask")


class AttachedCall:
    """A model's ``call`` that goes through a cache inside ``with cache:``. Copies and pickles as the plain one."""

    def __init__(self, cache: KVCache, model: Any) -> None:
        self.cache = cache
        self.model = model
        self.original = model.call
        self._before = vars(model).get("call")
        self._signature = model._call_signature
        self._own = set(self._signature.parameters)
        self.worth: Any = None
        self._supports_masking = model.supports_masking
        self._supports_jit = model.supports_jit

    def install(self) -> None:
        """Put this in the place of ``model.call``, which then also takes lengths and masks."""
        keep_apart()
        # Straight into the instance: Keras would track an attribute that is set.
        vars(self.model)["call"] = self
        self.model._call_signature = _with_row_arguments(self._signature)
        # Else Keras warns that a mask is lost, which this serves.
        self.model.supports_masking = True
        # XLA cannot ask the host what is cached; `compile` looks here.
        self.model.supports_jit = False

    def take_samples(self) -> None:
        """The model's results are kept per sample: it keeps its own arguments and masks."""
        self.model._call_signature = self._signature
        self.model.supports_masking = self._supports_masking

    def uninstall(self) -> None:
        """Give the model its own ``call`` back."""
        self.model.supports_jit = self._supports_jit
        if self._before is None:
            del vars(self.model)["call"]
        else:
            vars(self.model)["call"] = self._before
        self.model._call_signature = self._signature
        self.model.supports_masking = self._supports_masking

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call."""
        worth = self.worth
        if worth is not None and worth.skip and tf.executing_eagerly() and local.cache is self.cache:
            worth.skip -= 1
            worth.skipped += 1
            return self.original(*args, **{name: value for name, value in kwargs.items() if name in self._own})
        added = {name: kwargs[name] for name in _ROW_ARGUMENTS if _is_given(kwargs.get(name))}
        for name in _ROW_ARGUMENTS:
            if name not in self._own or not _is_given(kwargs.get(name)):
                kwargs.pop(name, None)
        if local.step is not None or is_symbolic() or (local.cache is not self.cache and not added.keys() - self._own):
            return self.original(*args, **kwargs)
        if local.cache is self.cache:
            site = self.cache.site_of(self.model, _looks_like_ids(args, kwargs))
            if site is not None:
                self.worth = site.worth
                return activation.call(self.cache, site, self.original, args, kwargs)
        return self._transparent(args, kwargs, added)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _class_call(memo[id(self.model)])

    def __reduce__(self) -> Any:
        return _class_call, (self.model,)

    # ---- inside `with cache:` ------------------------------------------------------------------

    def _transparent(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: dict[str, Any]) -> Any:
        training = kwargs.get("training")
        others = [str(at) for at in range(1, len(args))]
        others += [name for name, value in kwargs.items() if name not in (*rows, "training") and value is not None]
        x = args[0] if args else None
        if takes_token_dict(self.model) and isinstance(x, dict):
            x, rows = _from_token_dict(x, rows)
        if not tf.is_tensor(x):
            return self.original(*args, **kwargs)
        if others:
            self.cache.bypass(0, f"arguments besides the token ids are not cached (got {others})")
            return self.original(*args, **kwargs)
        if self.cache.frames is None:
            check_ids(x)
        else:
            check_frames(x, self.cache.frames)
            if not tf.executing_eagerly():
                if local.cache is self.cache:
                    self.cache.bypass(0, "frames are not cached inside a tf.function (stream them: open, step)")
                return self.original(*args, **kwargs)
        lengths, mask = rows.get("lengths"), rows.get("mask", rows.get("attention_mask"))
        in_block = local.cache is self.cache
        reason = _reason_to_bypass(training) if in_block else "outside"
        plain = {"training": training} if "training" in self._own else {}
        graph = GraphCall if not tf.executing_eagerly() else EagerCall
        call = graph(self, x, lengths, mask, plain)
        return call.plain(reason if in_block else None) if reason else call.cached()


def _looks_like_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is one of a token model: integer ids [B, T], and at most what says which are padding."""
    others = {name for name, value in kwargs.items() if value is not None} - {*_ROW_ARGUMENTS, "training"}
    return (
        len(args) == 1 and not others and tf.is_tensor(args[0]) and args[0].dtype.is_integer and args[0].shape.rank == 2
    )


def _reason_to_bypass(training: Any) -> str | None:
    """Why a call must be computed as outside, or None."""
    if training is not None and (tf.is_tensor(training) or training):
        return "the model is called with training=True"
    if recording():
        return "a GradientTape is recording; leave it, or use its stop_recording(), to use the cache"
    return reason_of_scope()


def _is_given(value: Any) -> bool:
    """Whether a mask or lengths are there; Keras itself passes a dictionary of None for a dictionary of inputs."""
    return value is not None and not isinstance(value, dict)


def _from_token_dict(x: dict[str, Any], rows: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """KerasHub's input as ids and a mask; a mask or lengths given besides it count instead."""
    ids = x.get("token_ids")
    if isinstance(ids, np.ndarray):
        ids = tf.convert_to_tensor(ids)
    return ids, rows or {"mask": x.get("padding_mask")}


def _with_row_arguments(signature_: inspect.Signature) -> inspect.Signature:
    parameters = list(signature_.parameters.values())
    tail = [parameters.pop()] if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    missing = [name for name in _ROW_ARGUMENTS if name not in signature_.parameters]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in missing]
    return signature_.replace(parameters=parameters + tail)


def _class_call(model: Any) -> Any:
    return types.MethodType(type(model).call, model)
