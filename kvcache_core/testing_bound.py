"""The bound of :mod:`kvcache_core.testing`: right outputs, and how wrong a model is without a cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvcache_core.frontend import FrontendCache

__all__ = ["REDRAWS", "Errors", "Truth", "Uncached", "distance", "longest", "over_draws", "padded"]

_Array = NDArray[Any]
_EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
REDRAWS = 12


class Errors(NamedTuple):
    """The largest errors of one draw: of equal mathematics with one rounding.

    Attributes:
        cached: of the outputs from the cache.
        uncached: of the model without the cache.
        slack: allowed whatever ``uncached`` is; invariant 1: 1 ulp of the dtype at the magnitude of the outputs.
        factor: how many times ``uncached`` is allowed; invariant 1: 1.5.
    """

    cached: float
    uncached: float
    slack: float
    factor: float = 1.5

    @property
    def bound(self) -> float:
        """The largest error allowed."""
        return self.factor * self.uncached + self.slack

    @property
    def holds(self) -> bool:
        """Whether the cached outputs are within the bound; never of NaN."""
        return self.cached <= self.bound


def over_draws(first: Errors, again: Callable[[int], Errors]) -> tuple[Errors, int]:
    """What counts of a draw: itself if its bound holds, else the means of it and a dozen more.

    The largest error of a few outputs is one draw of their rounding, on both sides; of equal models one is now and
    then twice the other's. Between the means of many draws of both a cache that rounds worse shows, for it does so
    in every draw.

    Args:
        first: the first draw.
        again: makes draw number 1, 2, ...: the same work with another rounding.

    Returns:
        The errors, and of how many draws they are the means.
    """
    if first.holds:
        return first, 1
    draws = [first, *(again(number) for number in range(1, 1 + REDRAWS))]
    return Errors(*(float(np.mean(numbers)) for numbers in zip(*draws, strict=True))), len(draws)


class Uncached:
    """The model without the cache.

    Args:
        model: attached to ``cache``.
        cache: knows the model's inputs and outputs; it is not used otherwise.
    """

    def __init__(self, model: Any, cache: FrontendCache) -> None:
        self._model, self._cache = model, cache

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[_Array]:
        """Outputs of ragged rows of ids: float64 [T, ...] per row."""
        return _cut(self._cache.to_numpy(self._model(self._cache.native_ids(padded(rows)))), rows)

    def logits(self, rows: Sequence[Sequence[int]]) -> _Array:
        """Behind each row's last token: [B, V]."""
        return np.stack([one[-1] for one in self(rows)])

    def wide(self) -> Callable[[_Array], _Array] | None:
        """The same in float64, ids [B, T] -> [B, T, ...]; None if that is no wider, or the framework cannot."""
        return self._cache.float64_model() if self.epsilon > _EPSILON["float64"] else None

    @property
    def epsilon(self) -> float:
        """Distance of 1 and the next larger number, in the coarser one of the output's and the K/V dtype."""
        spec = self._cache.spec
        return max(_EPSILON[spec.dtype], _EPSILON[spec.output_dtype]) if spec else _EPSILON["float32"]


class Truth:
    """The right outputs, and how wrong the model itself is without a cache.

    Args:
        uncached: runs the model.
        runs: token rows to compute; every head of one has its output in :attr:`outputs`.
        tolerance: the bound, if the caller gave one.
        random: draws the parts of runs that are computed too, where there is no wider reference.

    Attributes:
        outputs: the right output behind each head of each run.
        own: the largest error of an uncached run.
        reference: what that is measured against: ``"float64"``, ``"uncached"`` or ``"tolerance"``.
    """

    def __init__(
        self, uncached: Uncached, runs: list[tuple[int, ...]], tolerance: float | None, random: np.random.Generator
    ) -> None:
        self._uncached, self._tolerance = uncached, tolerance
        plain = [uncached([run])[0] for run in runs]
        magnitude = max(float(np.abs(one).max()) for one in plain)
        self._ulp = 2.0 ** math.floor(math.log2(max(magnitude, 1e-30))) * uncached.epsilon
        # A float64 model has nothing wider to be measured against.
        wide = uncached.wide() if tolerance is None else None
        exact = plain if wide is None else [wide(padded([run]))[0] for run in runs]
        self.outputs = {
            run[:end]: one[end - 1] for run, one in zip(runs, exact, strict=True) for end in range(1, len(run) + 1)
        }
        self.own = max(distance(one, true) for one, true in zip(plain, exact, strict=True))
        if wide is None:
            self.reference = "uncached" if tolerance is None else "tolerance"
            self._move(runs)
            for run in runs:
                self._move([run[: 1 + int(random.integers(len(run)))]])
        else:
            self.reference = "float64"

    def errors(self, cached: float) -> Errors:
        """The bound for ``cached``, the largest error of the outputs from the cache."""
        if self._tolerance is not None:
            return Errors(cached, self.own, self._tolerance, 0.0)
        if self.reference == "float64":
            return Errors(cached, self.own, self._ulp)
        return Errors(cached, min(self.own, 256 * self._ulp), 32 * self._ulp, 2.5)

    def _move(self, rows: Sequence[Sequence[int]]) -> None:
        """How far uncached outputs move when the rows are computed as this batch."""
        for row, one in zip(rows, self._uncached(rows), strict=True):
            before = np.stack([self.outputs[tuple(row[:end])] for end in range(1, len(row) + 1)])
            self.own = max(self.own, distance(one, before))


def padded(rows: Sequence[Sequence[int]]) -> _Array:
    """[B, T] ids, padded on the right with each row's last token."""
    width = max(map(len, rows))
    return np.array([[*row, *[row[-1]] * (width - len(row))] for row in rows], np.int64)


def _cut(output: _Array, rows: Sequence[Sequence[int]]) -> list[_Array]:
    return [one[: len(row)] for one, row in zip(output, rows, strict=True)]


def distance(one: _Array, other: _Array) -> float:
    """The largest difference of two outputs; NaN if there is one.

    Raises:
        AssertionError: they differ in shape.
    """
    if one.shape != other.shape:
        raise AssertionError(f"an output has shape {one.shape} with the cache and {other.shape} without")
    return float(np.abs(one - other).max())


def longest(runs: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The runs that are not the head of another one."""
    ordered = sorted(runs)
    return [run for run, after in zip(ordered, [*ordered[1:], ()], strict=True) if after[: len(run)] != run]
