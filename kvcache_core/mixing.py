"""Whether a module gives each sample its own result, whatever else is in its batch: shown once, on parts of a batch."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PART_TOLERANCE", "Proofs", "mixed", "moved", "part_tolerance", "parts_of", "raising"]

PART_TOLERANCE = {"float64": 1e-7, "float32": 3e-4, "float16": 0.02, "bfloat16": 0.15}
"""How far results computed in parts may be from those computed whole, per dtype: root mean square of a row's
difference, as a part of the largest row's own. In float32, what depends on other rows is off by far more."""

_COMPLEX = {"complex64": "float32", "complex128": "float64"}
_ROWS, _KNOWN_AT_MOST = 4, 1024


def part_tolerance(dtypes: Iterable[str]) -> float:
    """The bound for results that are computed in these dtypes, that is, in the coarsest of them."""
    names = [_COMPLEX.get(name, name) for name in dtypes]
    return max((PART_TOLERANCE[name] for name in names if name in PART_TOLERANCE), default=PART_TOLERANCE["float32"])


def parts_of(keys: Sequence[bytes]) -> list[list[int]]:
    """Two parts of a batch that share no sample, as its rows; none if all its samples are equal.

    What is decisive in a batch (its largest sample, its first) is missing from one of them. Every second row is taken,
    and backwards: samples that depend on those before or behind them, or on their place, get others there. The first
    row of a part is repeated: so it is no mirror image of what was taken, and no batch of one, which some modules treat
    in another way.

    Args:
        keys: one per sample; equal samples have equal ones.
    """
    first: dict[bytes, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    different = list(first.values())
    if len(different) < 2:
        return []
    count = _ROWS if len(different) >= 4 * _ROWS else 2
    halves = [half[-count:][::-1] for half in (different[1::2], different[::2])]
    return [[half[0], *half] for half in halves]


def moved(whole: NDArray[Any], part: NDArray[Any]) -> float:
    """How far the rows of a result [R, ...] moved: the largest row's difference, to be compared with the tolerance.

    Of floats its root mean square, as a part of that of the elements which differ (constants, as behind a mask, say
    nothing about rounding); of other numbers the share of elements that differ: a step between two may fall anywhere.
    """
    whole, part = (x.reshape(len(x), -1) for x in (whole, part))
    if whole.dtype.kind != "f":
        return float((whole != part).mean()) if whole.size else 0.0
    differs = (whole != part) & ~(np.isnan(whole) & np.isnan(part))
    if not differs.any():
        return 0.0
    one, other = whole.astype(np.float64), part.astype(np.float64)
    if not np.isfinite(one[differs]).all() or not np.isfinite(other[differs]).all():
        return float("inf")
    change = np.where(differs, one - np.where(differs, other, 0), 0)
    own = np.where(differs, one, 0)
    size = np.sqrt((own**2).sum(1) / np.maximum(differs.sum(1), 1)).max()
    return float(np.sqrt((change**2).mean(1)).max() / max(size, 1e-300))


def mixed(found: str) -> str:
    """The reason to bypass a module of which that was found."""
    return (
        f"a sample's result depends on the other samples of its batch ({found}; attach a part that computes each "
        "sample by itself, with the batch in front, and name inputs that belong to all samples in shared=)"
    )


def raising(error: Exception) -> str:
    """What samples were found to do for which the module raised that."""
    return "raise " + f"{type(error).__name__}: {error}".partition("\n")[0]


class Proofs:
    """Which ways of calling a module were shown to give each sample its own result, and which to mix them."""

    def __init__(self) -> None:
        self._proven: set[Hashable] = set()
        self._mixed: dict[Hashable, str] = {}

    def __contains__(self, way: Hashable) -> bool:
        """Whether samples called in this way may be computed without the others."""
        return way in self._proven

    def refusal(self, way: Hashable) -> str | None:
        """Why samples called in this way may not be kept, if that is known."""
        return self._mixed.get(way)

    def settle(self, way: Hashable, reason: str) -> None:
        """Remember what was found: a reason, or nothing."""
        if len(self._proven) + len(self._mixed) >= _KNOWN_AT_MOST:  # plain numbers that differ at each call
            self._proven.clear()
            self._mixed.clear()
        if reason:
            self._mixed[way] = reason
        else:
            self._proven.add(way)
