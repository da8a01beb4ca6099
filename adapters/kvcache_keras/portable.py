"""What a layer computes, as bytes that any process makes alike: for activations that leave the process."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from kvcache_core.described import Unclear, add_text, describe

__all__ = ["export_row", "layer_identity", "restore_row"]

_OURS = ("call", "supports_jit", "built", "name")
"""Attributes that say nothing about what is computed: those of attaching, of building, and names, which are counted."""
_PLAIN = (bool, int, float, str, bytes, tuple, type(None))


def layer_identity(layer: Any) -> bytes:
    """16 bytes for the configuration of a layer or model and of its parts, and every weight in its order.

    Raises:
        Unclear: a configuration that cannot be had, or of which nothing can be said, such as a lambda's.
    """
    parts = layer._flatten_layers()
    names = {part.name: f"#{number}" for number, part in enumerate(parts)}
    digest = blake2b(digest_size=16, person=b"kvcache-layer")
    for part in parts:
        try:
            config = part.get_config()
        except (NotImplementedError, TypeError, ValueError) as error:
            raise Unclear(f"{type(part).__qualname__}.get_config() fails ({error})") from error
        plain = {key: one for key, one in vars(part).items() if key not in _OURS and _is_plain(key, one)}
        add_text(digest, f"{describe(type(part))}{describe(_renamed(config, names))}{describe(_renamed(plain, names))}")
    for weight in layer.weights:
        with tf.init_scope():
            values = np.ascontiguousarray(weight.numpy())
        add_text(digest, f"{values.dtype.name}{values.shape}")
        digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.digest()


def _is_plain(key: str, value: Any) -> bool:
    return not key.startswith("_") and isinstance(value, _PLAIN)


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """A configuration with layers by their place: Keras counts names up within a process."""
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, dict):
        return {_renamed(key, names): _renamed(one, names) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_renamed(one, names) for one in value]
    return value


def export_row(row: NDArray[Any]) -> tuple[str, NDArray[Any]]:
    """An array as (dtype name, bits of its elements)."""
    array = np.ascontiguousarray(row).reshape(row.shape)
    return array.dtype.name, array.view(f"u{array.itemsize}") if array.itemsize <= 8 else array


def restore_row(name: str, bits: NDArray[Any]) -> NDArray[Any]:
    """The reverse of :func:`export_row`."""
    return np.array(bits).view(tf.as_dtype(name).as_numpy_dtype)
