"""What a cache of another size would have done: reuse distances, miss-ratio curves, and which size pays.

The reuse distance of an access is the number of different keys since the last access to the same key. An LRU cache
of ``size`` entries hits exactly the accesses with a distance below ``size`` (Mattson et al., "Evaluation techniques
for storage hierarchies", 1970), so one pass over a trace answers for all sizes at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvcache_core.errors import InvalidInput

__all__ = ["Advice", "MissRatioCurve", "advise", "miss_ratio_curve", "reuse_distances", "uniform_hit_ratio"]


def reuse_distances(trace: Sequence[Hashable]) -> NDArray[np.float64]:
    """The reuse distance of each of n accesses, float64 [n]; infinite for a key's first access. O(n log n).

    A Fenwick tree counts the places that are some key's latest access.

    Example:
        >>> reuse_distances("abcab").tolist()
        [inf, inf, inf, 2.0, 2.0]
    """
    count = len(trace)
    tree = [0] * (count + 1)
    latest: dict[Hashable, int] = {}
    distances = np.full(count, np.inf)
    for place, key in enumerate(trace, start=1):
        before = latest.get(key)
        if before is not None:
            # Every key's latest access lies at one place: those behind `before` are the keys in between.
            distances[place - 1] = len(latest) - _sum(tree, before)
            _add(tree, before, -1)
        _add(tree, place, 1)
        latest[key] = place
    return distances


def _add(tree: list[int], place: int, change: int) -> None:
    while place < len(tree):
        tree[place] += change
        place += place & -place


def _sum(tree: list[int], place: int) -> int:
    total = 0
    while place:
        total += tree[place]
        place -= place & -place
    return total


@dataclass(frozen=True)
class MissRatioCurve:
    """Misses of an LRU cache of every size over one trace.

    Attributes:
        accesses: n.
        hits: int64 [K + 1]: hits with 0 .. K entries, K the number of different keys.
    """

    accesses: int
    hits: NDArray[np.int64]

    @property
    def keys(self) -> int:
        """Different keys in the trace: no larger cache hits more."""
        return len(self.hits) - 1

    def hit_ratio(self, size: int) -> float:
        """Hits over accesses with ``size`` entries."""
        return float(self.hits[min(max(size, 0), self.keys)]) / self.accesses if self.accesses else 0.0

    def miss_ratio(self, size: int) -> float:
        """Misses over accesses with ``size`` entries."""
        return 1.0 - self.hit_ratio(size) if self.accesses else 0.0

    def smallest(self, hit_ratio: float) -> int | None:
        """The smallest size that reaches a hit ratio; None if no size does."""
        reached = np.flatnonzero(self.hits >= hit_ratio * self.accesses - 1e-9)
        return int(reached[0]) if len(reached) else None


def miss_ratio_curve(trace: Sequence[Hashable]) -> MissRatioCurve:
    """The curve of a recorded trace of keys.

    Example:
        >>> curve = miss_ratio_curve("abcabc")
        >>> [curve.hit_ratio(size) for size in (2, 3)]
        [0.0, 0.5]
    """
    distances = reuse_distances(trace)
    finite = distances[np.isfinite(distances)].astype(np.int64)
    counts = np.bincount(finite, minlength=len(set(trace)))
    return MissRatioCurve(len(trace), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def uniform_hit_ratio(size: int, items: int, accesses: int | None = None) -> float:
    """Expected hit ratio of a cache of ``size`` entries if every access picks one of ``items`` at random.

    Assumes: accesses independent of each other, all items equally likely and equally large, the cache empty at the
    start, every miss kept. Then any eviction rule that looks at the past alone does the same. Access t finds its
    item with probability E[min(size, D)] / items, where D is the number of different items among the t - 1 accesses
    before it, E[D] = items (1 - (1 - 1 / items) ^ (t - 1)). The expectation is put inside the minimum, which
    overestimates by a fraction of a per cent where the cache is just filling up.

    Args:
        size: entries.
        items: different items.
        accesses: how many there are from the start; None for the long run, min(size / items, 1).

    Raises:
        InvalidInput: a number below 1.

    Example:
        >>> uniform_hit_ratio(100, 1000), round(uniform_hit_ratio(100, 1000, 1000), 3)
        (0.1, 0.095)
    """
    for name, value in (("size", size), ("items", items), ("accesses", 1 if accesses is None else accesses)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidInput(f"{name} must be a whole number, at least 1; got {value!r}")
    if accesses is None:
        return min(size / items, 1.0)
    seen = (
        items * -np.expm1(np.arange(accesses) * np.log1p(-1.0 / items)) if items > 1 else np.minimum(range(accesses), 1)
    )
    return float(np.minimum(seen, size).sum() / items / accesses)


@dataclass(frozen=True, slots=True)
class Advice:
    """Which size pays, by a recorded trace.

    Attributes:
        accesses: accesses in the trace.
        size: the size now, in entries.
        hit_ratio: what an LRU cache of that size would have reached.
        best: the smallest size that reaches 95 % of the hits that any size would.
        best_hit_ratio: its hit ratio.
        seconds: what its hits would have saved more (or less) than those of the size now, over the trace.
        bytes: what its entries would take.
    """

    accesses: int
    size: int
    hit_ratio: float
    best: int
    best_hit_ratio: float
    seconds: float
    bytes: int

    def __str__(self) -> str:
        if not self.accesses:
            return "no accesses were recorded"
        now = f"{self.size} entries: hit ratio {self.hit_ratio:.2f} over {self.accesses} recorded accesses"
        if self.best == 0:
            return f"{now}; no size would have hit anything"
        if self.best == self.size:
            return f"{now}; that is the size that pays"
        return (
            f"{now}; {self.best} entries ({self.bytes / 2**20:.1f} MiB) reach {self.best_hit_ratio:.2f} "
            f"({self.seconds:+.2f} s)"
        )


def advise(
    trace: Sequence[Hashable], size: int, *, seconds_per_miss: float = 0.0, bytes_per_entry: float = 0.0
) -> Advice:
    """Which size pays for accesses like those of ``trace``.

    Args:
        trace: keys in the order of their accesses.
        size: entries now.
        seconds_per_miss: what computing one takes.
        bytes_per_entry: what one takes.

    Example:
        >>> print(advise("abcabcabc" * 10, 2, seconds_per_miss=0.1, bytes_per_entry=2**20))
        2 entries: hit ratio 0.00 over 90 recorded accesses; 3 entries (3.0 MiB) reach 0.97 (+8.70 s)
    """
    curve = miss_ratio_curve(trace)
    most = curve.hit_ratio(curve.keys)
    best = curve.smallest(0.95 * most) or 0
    gained = (curve.hit_ratio(best) - curve.hit_ratio(size)) * curve.accesses
    return Advice(
        curve.accesses,
        size,
        curve.hit_ratio(size),
        best,
        curve.hit_ratio(best),
        gained * seconds_per_miss,
        int(best * bytes_per_entry),
    )
