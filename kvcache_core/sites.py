"""The modules whose activations a cache keeps, and the one store of entries behind them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from kvcache_core.activation import ActivationSite
from kvcache_core.admission import Admission
from kvcache_core.entries import EntryCache
from kvcache_core.sharing import UseClock

__all__ = ["Sites"]


class Sites:
    """The attached modules of one cache, over one :class:`EntryCache`.

    Args:
        size: capacity in entries; or
        memory: capacity in bytes.
        admit: which results are kept.

    Attributes:
        clock: the order of uses, and the lock, that the cache's blocks are to share.
    """

    def __init__(self, size: int | None, memory: int | None, admit: Admission) -> None:
        self.clock = UseClock()
        self.entries = EntryCache(size, memory=memory, admit=admit, clock=self.clock)
        self._sites: dict[int, ActivationSite] = {}
        self._numbers: dict[int, tuple[Callable[[], Any], int]] = {}
        self._count = itertools.count(1)
        self._detached: dict[int, ActivationSite] = {}

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[ActivationSite]:
        """The attached modules' sites."""
        return iter(list(self._sites.values()))

    def number(self, module: Any) -> int:
        """A number that stands for the module in keys, the same when it is attached again."""
        known = self._numbers.get(id(module))
        if known is None or known[0]() is not module:
            known = self._numbers[id(module)] = (weakref.ref(module), next(self._count))
        return known[1]

    def add(self, site: ActivationSite) -> ActivationSite:
        """Attach a module; one that was attached before is known again with what is kept of it."""
        known = self._detached.pop(id(site.module), None)
        if known is not None and known.module is site.module and known.options == site.options:
            site = known
        self._sites[id(site.module)] = site
        return site

    def get(self, module: Any) -> ActivationSite | None:
        """The module's site, if it is attached here."""
        return self._sites.get(id(module))

    def remove(self, module: Any) -> None:
        """Detach a module; what is kept of it stays."""
        site = self._sites.pop(id(module), None)
        if site is not None:
            self._detached[id(module)] = site

    def clear(self) -> None:
        """Drop every entry, and detached modules with them."""
        self.entries.clear()
        self._detached.clear()

    @property
    def seconds_saved(self) -> float:
        """Estimated seconds of computing that hits made unnecessary."""
        sites: tuple[ActivationSite, ...] = (*self, *self._detached.values())
        return sum(site.worth.saved for site in sites)

    @property
    def skipped(self) -> int:
        """Calls that were computed without the cache because it does not pay."""
        sites: tuple[ActivationSite, ...] = (*self, *self._detached.values())
        return sum(site.worth.skipped for site in sites)

    @property
    def seconds_spent(self) -> float:
        """Seconds spent on hashing, looking up, copying and putting together."""
        sites: tuple[ActivationSite, ...] = (*self, *self._detached.values())
        return sum(site.worth.spent for site in sites)
