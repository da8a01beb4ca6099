"""A progress bar on standard error, for what takes a while before traffic comes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import TextIO, TypeVar

__all__ = ["progress"]

_WIDTH = 30
_Item = TypeVar("_Item")


def progress(
    items: Iterable[_Item], what: str, *, show: bool | None = None, stream: TextIO | None = None
) -> Iterator[_Item]:
    """Go through ``items`` and show how far it is.

    Args:
        items: what to go through; without a known length there is no bar.
        what: the word in front of the bar.
        show: whether there is a bar; None: where ``stream`` is a terminal.
        stream: where it is drawn; default standard error.

    Example:
        >>> import sys
        >>> list(progress([1, 2], "warm", show=False))
        [1, 2]
    """
    where = sys.stderr if stream is None else stream
    count, drawn = length_hint(items), -1
    if not (where.isatty() if show is None else show) or not count:
        yield from items
        return
    try:
        for done, item in enumerate(items):
            drawn = _draw(where, what, done, count, drawn)
            yield item
        _draw(where, what, count, count, drawn)
    finally:
        where.write("\n")
        where.flush()


def _draw(where: TextIO, what: str, done: int, count: int, drawn: int) -> int:
    """Draw the bar if it has grown by a thousandth; returns the thousandths that are drawn."""
    thousandths = 1000 * done // count
    if thousandths != drawn:
        filled = _WIDTH * done // count
        where.write(f"\r{what} [{'#' * filled}{'.' * (_WIDTH - filled)}] {done}/{count}")
        where.flush()
    return thousandths
