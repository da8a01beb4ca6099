"""The graphs of ``fit``, ``evaluate`` and ``predict``: one outside ``with cache:``, and one inside.

Keras traces each once and keeps it with the model. Traced outside, it would go past the cache inside; traced inside, it
would use the cache outside.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import keras

from kvcache_keras.context import local

__all__ = ["keep_apart"]

_KEPT = "_kvcache_functions"
_State = tuple[weakref.ref[Any], ...]
"""What stands in for the ``call`` of each layer that is served; empty outside."""


@functools.cache
def keep_apart() -> None:
    """Have Keras's models keep a function for each state they are called in. It stays: others are not changed by it."""
    for kind in ("train", "test", "predict"):
        maker = f"make_{kind}_function"
        setattr(keras.Model, maker, _in_its_state(f"{kind}_function", getattr(keras.Model, maker)))


def _in_its_state(name: str, make: Callable[..., Any]) -> Callable[..., Any]:
    """A model's ``make``, which Keras calls before it uses the function called ``name``."""

    @functools.wraps(make)
    def made(model: Any, force: bool = False) -> Any:
        kept = vars(model).setdefault(_KEPT, {}).setdefault(name, _Functions())  # past Keras, which would track it
        kept.bring(model, name, anew=force)
        found = make(model, force)
        kept.function = getattr(model, name)
        return found

    return made


class _Functions:
    """The functions of one kind that a model has. Copies and pickles as none."""

    def __init__(self) -> None:
        self.function: Any = None
        """The one that the model has now, made in ``state``."""
        self.state: _State = ()
        self.others: dict[_State, Any] = {}

    def bring(self, model: Any, name: str, *, anew: bool) -> None:
        """Put the function of the state that the model is in now in its place, or None if there is none yet."""
        now, state = getattr(model, name), _state_of(model)
        if now is None or anew:  # compiled anew: all of them are void
            self.others.clear()
            self.state = state
        elif now is not self.function:
            if not _is_of_keras(now):
                return
            self.others.clear()
            self.state = ()  # made before any layer was attached
        if state != self.state:
            self.others[self.state] = now
            setattr(model, name, self.others.pop(state, None))
            self.state = state
        self.others = {state: function for state, function in self.others.items() if all(map(_is_attached, state))}

    def __reduce__(self) -> Any:
        return _Functions, ()


def _state_of(model: Any) -> _State:
    if local.cache is None:
        return ()
    calls = (vars(layer).get("call") for layer in model._flatten_layers())
    return tuple(weakref.ref(call) for call in calls if getattr(call, "cache", None) is local.cache)


def _is_attached(call: weakref.ref[Any]) -> bool:
    there = call()
    return there is not None and vars(there.model).get("call") is there


def _is_of_keras(function: Any) -> bool:
    """Whether Keras made it, and not the user."""
    made = getattr(function, "python_function", function)
    return getattr(made, "__module__", "").startswith("keras.src.")
