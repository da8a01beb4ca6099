"""The bound of :mod:`kvcache_core.testing`: right outputs, and how wrong a model is without a cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.frontend import FrontendCache

__all__ = ["Truth", "Uncached", "distance", "longest", "padded"]

_Array = NDArray[Any]
_EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


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
    """The right outputs, how wrong the model itself is without a cache, and the bound that follows.

    Args:
        uncached: runs the model.
        runs: token rows to compute; every head of one has its output in :attr:`outputs`.
        tolerance: the bound, if the caller gave one.
        random: draws the parts of runs that are computed too.
    """

    def __init__(
        self, uncached: Uncached, runs: list[tuple[int, ...]], tolerance: float | None, random: np.random.Generator
    ) -> None:
        self._uncached, self._tolerance = uncached, tolerance
        plain = [uncached([run])[0] for run in runs]
        magnitude = max(float(np.abs(one).max()) for one in plain)
        self._ulp = 2.0 ** math.floor(math.log2(max(magnitude, 1e-30))) * uncached.epsilon
        # A float64 model has nothing wider to be measured against.
        self._wide = uncached.wide() if tolerance is None else None
        if self._wide is None:
            self.reference = "uncached" if tolerance is None else "tolerance"
        else:
            self.reference = "float64"
        exact = plain if self._wide is None else [self._exact([run])[0] for run in runs]
        self.outputs = {
            run[:end]: one[end - 1] for run, one in zip(runs, exact, strict=True) for end in range(1, len(run) + 1)
        }
        self.own = max(distance(one, true) for one, true in zip(plain, exact, strict=True))
        self._draw(runs)
        for run in runs:
            self._draw([run[: 1 + int(random.integers(len(run)))]])

    @property
    def bound(self) -> float:
        """The largest error allowed."""
        if self._tolerance is not None:
            return self._tolerance
        if self._wide is not None:
            return 1.5 * self.own + self._ulp
        return 2.5 * min(self.own, 256 * self._ulp) + 32 * self._ulp

    def draw_again(self, tokens: tuple[int, ...]) -> None:
        """More uncached runs of one place, in batches of other shapes."""
        for rows in range(1, 5):
            for more in range(4):
                longer = tokens if self._wide is None else (*tokens, *tokens[:more])
                self._draw([longer] * rows)

    def _draw(self, rows: Sequence[Sequence[int]]) -> None:
        # Like with like: the same rows on both sides, so that a model that mixes rows or tokens gains nothing.
        if self._wide is not None:
            exact = self._exact(rows)
        else:
            exact = [np.stack([self.outputs[tuple(row[:end])] for end in range(1, len(row) + 1)]) for row in rows]
        for one, true in zip(self._uncached(rows), exact, strict=True):
            self.own = max(self.own, distance(one, true))

    def _exact(self, rows: Sequence[Sequence[int]]) -> list[_Array]:
        run = self._wide
        return [] if run is None else _cut(run(padded(rows)), rows)


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
