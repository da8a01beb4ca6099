"""What each tier has done, and whether loading from it costs less than computing: measured as it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Average", "Costs", "TierStats"]

_PROBE_EVERY = 64
"""A tier that costs more than computing is tried again once in so many lookups."""

_MOSTLY = 0.5
"""A tier is slow if so much of the time that loading takes is spent waiting for it: only that can be overlapped."""


@dataclass
class TierStats:
    """What one tier has done for a cache.

    Attributes:
        name: the tier's name.
        hits: values found and used.
        misses: values asked for and not there.
        refused: values that did not verify, each a miss.
        errors: calls that failed, each a miss for all it asked for.
        skipped: lookups left out because loading costs more than computing.
        stored: values written.
        lost: values that could not be written.
        read_bytes: bytes of the values found.
        seconds_per_mib: what loading costs, a moving average; 0.0 before the first hit.
        recompute_seconds_per_mib: what computing as many bytes costs, at the last lookup; 0.0 while that is unknown.
        waiting_share: how much of loading is waiting for the tier, 0.0 to 1.0; the rest is this process's own work.
    """

    name: str
    hits: int = 0
    misses: int = 0
    refused: int = 0
    errors: int = 0
    skipped: int = 0
    stored: int = 0
    lost: int = 0
    read_bytes: int = 0
    seconds_per_mib: float = 0.0
    recompute_seconds_per_mib: float = 0.0
    waiting_share: float = 0.0


@dataclass
class Average:
    """A moving average that follows a change of load within some ten observations."""

    value: float = 0.0
    seen: int = 0

    def add(self, value: float) -> None:
        """One observation more."""
        self.seen += 1
        self.value += (value - self.value) * max(0.2, 1 / self.seen)


class Costs:
    """What loading from each tier has cost, against what computing the same would.

    Args:
        stats: one per tier; the costs are shown there.
        always: use every tier whatever it costs.
    """

    def __init__(self, stats: Sequence[TierStats], *, always: bool) -> None:
        self._stats = stats
        self._always = always
        self._loads = [Average() for _ in stats]
        self._shares = [Average() for _ in stats]

    def loaded(self, number: int, nbytes: int, seconds: float, worked: float | None = None) -> None:
        """Tier ``number`` took ``seconds`` to give ``nbytes``, verified; for ``worked`` of them this thread ran.

        ``worked`` is None where computing went on meanwhile: a thread that waits for a processor is not waiting for a
        tier.
        """
        self._loads[number].add(seconds / nbytes)
        self._stats[number].seconds_per_mib = self._loads[number].value * 2**20
        if worked is not None:
            self._shares[number].add(max(0.0, 1 - worked / seconds))
            self._stats[number].waiting_share = self._shares[number].value

    def waiting(self, number: int, nbytes: int) -> float:
        """Seconds of waiting in loading ``nbytes`` from tier ``number``; 0.0 if most of loading is work."""
        share = self._shares[number].value
        return share * self._loads[number].value * nbytes if share >= _MOSTLY else 0.0

    def pays(self, number: int, nbytes: int, compute_seconds: float) -> bool:
        """Whether loading ``nbytes`` from tier ``number`` costs less than computing them.

        Args:
            number: of the tier.
            nbytes: of what is looked for.
            compute_seconds: what computing it takes; 0.0 if that is not known yet.
        """
        load, stats = self._loads[number], self._stats[number]
        stats.recompute_seconds_per_mib = compute_seconds / nbytes * 2**20 if nbytes else 0.0
        if self._always or not load.seen or not compute_seconds or load.value * nbytes < compute_seconds:
            return True
        stats.skipped += 1
        return stats.skipped % _PROBE_EVERY == 0
