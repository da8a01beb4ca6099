"""Masks that Keras carries on tensors, as those of ``Embedding(mask_zero=True)``: inputs and outputs like others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvcache_core.errors import InvalidType
from kvcache_core.tree import flatten

__all__ = ["MASKS", "carrying", "masks_of", "unwrapped"]

MASKS = "_kvcache_masks"
"""The argument by which a function that :func:`carrying` gives is told its inputs' masks."""

_Is = Callable[[Any], bool]


class _Masked(NamedTuple):
    """An output, and a mask or None for each of its tensors."""

    output: Any
    masks: tuple[Any, ...]


def masks_of(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """The mask or None that each tensor carries; empty if none carries one."""
    masks = tuple(getattr(tensor, "_keras_mask", None) for tensor in tensors)
    return masks if any(mask is not None for mask in masks) else ()


def carrying(original: Callable[..., Any], is_tensor: _Is) -> Callable[..., Any]:
    """A layer's call whose masks are arguments and results as others are: see :data:`MASKS` and :func:`unwrapped`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        _put(flatten((args, kwargs), is_tensor)[0], kwargs.pop(MASKS, ()))
        output = original(*args, **kwargs)
        try:
            masks = masks_of(flatten(output, is_tensor)[0])
        except InvalidType:
            return output  # it is not kept anyway
        return _Masked(output, masks) if masks else output

    return run


def unwrapped(result: Any, is_tensor: _Is) -> Any:
    """The layer's own output, with its masks where Keras looks for them."""
    if not isinstance(result, _Masked):
        return result
    _put(flatten(result.output, is_tensor)[0], result.masks)
    return result.output


def _put(tensors: Sequence[Any], masks: Sequence[Any]) -> None:
    for tensor, mask in zip(tensors, masks, strict=False):  # the masks themselves come last among the inputs
        if mask is not None:
            tensor._keras_mask = mask
