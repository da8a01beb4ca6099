"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

from kvcache_core.errors import InvalidInput

__all__ = ["parse_memory"]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_memory(text: str | int) -> int:
    """Bytes of ``"2GiB"``, ``"500 MB"`` or a plain number.

    Raises:
        InvalidInput: the text is no size, or not positive.

    Example:
        >>> parse_memory("2GiB"), parse_memory("1.5 kB")
        (2147483648, 1500)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise InvalidInput(f"memory must be a size like '2GiB', '500MB' or a number of bytes, got {text!r}")
    size = int(float(match[1]) * unit)
    if size < 1:
        raise InvalidInput(f"memory must be more than zero, got {text!r}")
    return size
