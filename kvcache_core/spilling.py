"""All that would end with the process, written into one tier that outlives it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from kvcache_core.opentiers import OpenTiers
from kvcache_core.tiers import Item

__all__ = ["spill"]

Skip = Callable[[bytes], bool]
"""Whether to leave a key out."""


def spill(
    tiers: OpenTiers, target: int, contents: Callable[[Skip], Iterable[Sequence[Item]]], deadline: float | None
) -> bool:
    """Write what is kept above a tier, and what the tiers before it hold, into that one; whether all of it is there.

    Args:
        tiers: all of them.
        target: the number of the one to write to.
        contents: what is kept above the tiers, a few values at a time.
        deadline: when to give up (``time.monotonic()``).
    """
    found: set[bytes] = set()  # when it begins: others may go on meanwhile
    written: set[bytes] = set()

    def is_there(key: bytes) -> bool:
        found.add(key)
        return key in written or tiers.has(target, key)

    def is_done(key: bytes) -> bool:
        return key not in found or tiers.has(target, key)

    def write_missing(skip: Skip) -> bool:
        """Write what is not to be skipped; False if a part of it was ``written`` before: it does not fit."""
        stats = tiers.stats[target]
        volatile = ([item] for tier in tiers.tiers[:target] for item in tier.volatile_items() if not skip(item[0]))
        for items in chain(contents(skip), volatile):
            errors, keys = stats.errors, {key for key, _ in items}
            if keys & written:
                return False
            written.update(keys)
            tiers.queue.write(items, target)
            if stats.errors != errors or (deadline is not None and time.monotonic() > deadline):
                return False
        return True

    done, before = write_missing(is_there), 0
    # Until nothing is missing: to make room, what lay there already and had not been used for longest is deleted.
    while done and len(written) > before and tiers.tiers[target].exact_contains:
        before = len(written)
        done = write_missing(is_done)
    return done
