"""A model as what the cache needs: token ids [B, T] in, one output per token out."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf

__all__ = ["FORWARDS", "model_input", "run_model", "takes_token_dict"]

_Tensor = Any

FORWARDS: weakref.WeakKeyDictionary[Any, Callable[[_Tensor], _Tensor]] = weakref.WeakKeyDictionary()
"""How to run the models that are more than that: a decoder behind an encoder."""


def run_model(model: Any, tokens: _Tensor) -> _Tensor:
    """The model's outputs [B, T, ...] for ids [B, T]."""
    forward = FORWARDS.get(model)
    return model(model_input(model, tokens), training=False) if forward is None else forward(tokens)


def model_input(model: Any, tokens: _Tensor) -> Any:
    """Ids [B, T] as the model takes them: as they are, or with KerasHub's mask of what is no padding."""
    if not takes_token_dict(model):
        return tokens
    return {"token_ids": tokens, "padding_mask": tf.ones_like(tokens)}


def takes_token_dict(model: Any) -> bool:
    """Whether the model's input is KerasHub's: {"token_ids", "padding_mask"}."""
    inputs = getattr(model, "_inputs_struct", None)
    return isinstance(inputs, dict) and set(inputs) == {"token_ids", "padding_mask"}
