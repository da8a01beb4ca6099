"""What callers hand in, checked: token ids, salts, extra keys, whole numbers."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from operator import index

import numpy as np

from kvcache_core.errors import InvalidInput, InvalidType
from kvcache_core.types import TokenIds

__all__ = ["MAX_TOKEN", "check_salt", "check_size", "checked_extras", "token_array", "whole"]

MAX_TOKEN = 2**31 - 1


def token_array(token_ids: TokenIds, what: str) -> array[int]:
    """Check token ids and return them as an int32 array.

    Raises:
        InvalidType: not integers.
        InvalidInput: empty, not one-dimensional, negative or above 2**31 - 1.
    """
    if isinstance(token_ids, (list, tuple)):
        try:
            # An array of unsigned integers takes them in half the time of signed ones.
            tokens = array("i", array("I", token_ids).tobytes())
        except TypeError:
            raise InvalidType(f"{what} must be integers, got {_sample(token_ids)}") from None
        except OverflowError:
            wrong = next(token for token in token_ids if not 0 <= token <= MAX_TOKEN)
            raise InvalidInput(f"{what} has a token id outside 0 .. {MAX_TOKEN}: {wrong}") from None
    else:
        values = np.asarray(token_ids)
        if values.ndim != 1:
            raise InvalidInput(f"{what} must have one dimension, got shape {values.shape}")
        if values.size and values.dtype.kind not in "iu":
            raise InvalidType(f"{what} must be integers, got dtype {values.dtype}")
        if values.size and (int(values.max()) > MAX_TOKEN or int(values.min()) < 0):
            raise InvalidInput(
                f"{what} has a token id outside 0 .. {MAX_TOKEN}: ids are {values.min()} .. {values.max()}"
            )
        tokens = array("i", values.astype(np.int32).tobytes())
    if not tokens:
        raise InvalidInput(f"{what} needs at least one token, got none")
    lowest = min(tokens) if len(tokens) < 64 else np.frombuffer(tokens, np.int32).min()
    if lowest < 0:
        raise InvalidInput(f"{what} has a token id outside 0 .. {MAX_TOKEN}: {int(lowest) % 2**32}")
    if lowest < 2 and isinstance(token_ids, (list, tuple)):
        _refuse_bools(token_ids, tokens, what)
    return tokens


def _refuse_bools(token_ids: Sequence[int], tokens: array[int], what: str) -> None:
    """A bool has become 0 or 1, so no other token needs a look."""
    for at in np.flatnonzero(np.frombuffer(tokens, np.int32) < 2).tolist():
        if isinstance(token_ids[at], bool):
            raise InvalidType(f"{what} must be integers, got {token_ids[at]} at {at}")


def check_salt(salt: bytes) -> None:
    """Raise InvalidType unless the salt is bytes."""
    if not isinstance(salt, bytes):
        raise InvalidType(f"salt must be bytes, got {type(salt).__name__}: {_sample(salt)}")


def whole(value: int, name: str) -> int:
    """The value as an int; raises InvalidType for what is no whole number."""
    try:
        return index(value)
    except TypeError:
        raise InvalidType(f"{name} must be a whole number, got {_sample(value)}") from None


def _sample(values: object) -> str:
    text = repr(values)
    return text if len(text) <= 80 else text[:77] + "..."


def checked_extras(extra_keys: Mapping[int, bytes] | None) -> dict[int, bytes]:
    """A copy of the extra keys; raises InvalidInput unless they map positions to bytes."""
    if not extra_keys:
        return {}
    for position, value in extra_keys.items():
        if not isinstance(position, int) or position < 0 or not isinstance(value, bytes):
            raise InvalidInput(f"extra_keys must map positions >= 0 to bytes, got {position!r}: {value!r}")
    return dict(extra_keys)


def check_size(num_blocks: int) -> None:
    """Raise InvalidInput unless ``num_blocks`` can be the size of a pool."""
    if isinstance(num_blocks, bool) or not isinstance(num_blocks, int) or num_blocks < 1:
        raise InvalidInput(f"a pool needs a whole number of blocks, at least 1; got {num_blocks!r}")
