"""Tiers that are open, from the top down: every read and write is guarded and counted, a failure is a miss."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from kvcache_core.blockformat import FORMAT_VERSION, KINDS, secret_from_environment
from kvcache_core.demotion import DemotionQueue
from kvcache_core.errors import BlockRefused, InvalidInput, KVCacheWarning
from kvcache_core.readahead import Ahead, Batch, ReadAhead, Wanted
from kvcache_core.tiercosts import Costs, TierStats
from kvcache_core.tiers import Item, Tier, open_tier
from kvcache_core.waiting import within

__all__ = ["OpenTiers", "Wanted", "tier_key"]

_QUEUE_BYTES = 256 << 20
_AHEAD_BYTES = 256 << 20


def tier_key(kind: str, group: int, key: bytes) -> bytes:
    """The key of a result in a tier: format version, kind, layer group (0 for entries), chained or content key."""
    return bytes((FORMAT_VERSION, KINDS[kind], group)) + key


class OpenTiers:
    """Tiers from the top down, the queue into the first of them, and what is known about their cost.

    Args:
        tiers: URLs or :class:`~kvcache_core.tiers.Tier` objects, the nearest first.
        queue_bytes: bytes of results that may wait to be written; further ones are dropped and counted.
        ahead_bytes: bytes of results that are read ahead for prompts that wait, at most; 0 turns it off.
        promote: ``"auto"``: a tier is used while loading costs less than recomputing; ``"always"``.
        secret: signs and checks every value; default is the environment's ``KVCACHE_SECRET``.

    Attributes:
        demoted_blocks: results that were queued to be written.
        dropped_blocks: results that were not, because the queue was full.
        prefetched_blocks: results that had been read ahead when they were looked for.
    """

    def __init__(
        self,
        tiers: Sequence[str | Tier],
        *,
        queue_bytes: int = _QUEUE_BYTES,
        ahead_bytes: int = _AHEAD_BYTES,
        promote: str = "auto",
        secret: bytes | None = None,
    ) -> None:
        if promote not in ("auto", "always"):
            raise InvalidInput(f"promote must be 'auto' or 'always', got {promote!r}")
        self.tiers: list[Tier] = []
        self._own: list[Tier] = []
        try:
            for tier in tiers:
                self.tiers.append(open_tier(tier))
                if self.tiers[-1] is not tier:
                    self._own.append(self.tiers[-1])
        except BaseException:
            self._let_go()
            raise
        for tier in self.tiers[:-1]:
            tier.keep_displaced = True
        self.secret = secret_from_environment() if secret is None else secret
        self.stats = [TierStats(tier.name) for tier in self.tiers]
        self.costs = Costs(self.stats, always=promote == "always")
        self.demoted_blocks = self.dropped_blocks = self.prefetched_blocks = 0
        self._rewrite: set[bytes] = set()
        self._warned: set[str] = set()
        self.queue = DemotionQueue(self.tiers, queue_bytes, self.has, self._wrote)
        self.ahead = ReadAhead(ahead_bytes)

    @property
    def persistent(self) -> int | None:
        """The number of the first tier that outlives the process."""
        return next((at for at, tier in enumerate(self.tiers) if tier.persistent and not tier.read_only), None)

    # ---- down ----------------------------------------------------------------------------------

    def has(self, number: int, key: bytes) -> bool:
        """Whether writing a value to a tier would add nothing."""
        tier = self.tiers[number]
        if tier.read_only:
            return True
        if key in self._rewrite:
            return False
        try:
            return tier.contains(key)
        except Exception:
            return False

    def is_kept(self, key: bytes) -> bool:
        """Whether a result is in the queue or in the first tier that can be written."""
        if self.queue.get(key) is not None:
            return True
        number = next((at for at, tier in enumerate(self.tiers) if not tier.read_only), None)
        return number is None or self.has(number, key)

    def _wrote(self, number: int, items: Sequence[Item], error: Exception | None) -> None:
        stats = self.stats[number]
        if error is None:
            stats.stored += len(items)
            self._rewrite.difference_update(key for key, _ in items)
            return
        stats.errors += 1
        stats.lost += len(items)
        self._warn(f"tier {stats.name} did not take blocks ({error})", "write " + stats.name)

    # ---- up ------------------------------------------------------------------------------------

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Inside, payloads that were read may be views into a tier."""
        with ExitStack() as leases:
            for tier in self.tiers:
                with suppress(Exception):  # reading from it says what is wrong
                    leases.enter_context(tier.lease())
            yield

    def read(self, wanted: Sequence[Wanted], nbytes: int, compute_seconds: float) -> None:
        """Fill in payloads: from the queue, from what was read ahead, then in one batched read per tier that pays.

        Args:
            wanted: what is looked for.
            nbytes: of the values of one unit of work (a token block in all its layer groups, one entry).
            compute_seconds: what computing one unit takes; 0.0 if that is unknown.
        """
        early = self.ahead.take(one.tier_key for one in wanted)
        for one in wanted:
            one.payload = self.queue.get(one.tier_key)
            if one.payload is None and one.tier_key in early:
                one.payload, one.asked = early[one.tier_key].payload, early[one.tier_key].asked
                self.prefetched_blocks += one.payload is not None
        self._read_tiers(range(len(self.tiers)), nbytes, compute_seconds, wanted)

    def _read_tiers(
        self,
        numbers: Iterable[int],
        nbytes: int,
        compute_seconds: float,
        wanted: Sequence[Wanted],
        *,
        ahead: bool = False,
    ) -> None:
        for number in numbers:
            missing = [one for one in wanted if one.payload is None and number not in one.asked]
            if missing and self.costs.pays(number, nbytes, compute_seconds):
                self._read(number, missing, ahead=ahead)

    def slow_tiers(self) -> list[int]:
        """The tiers where loading is mostly waiting."""
        return [number for number in range(len(self.tiers)) if self.costs.waiting(number, 1)]

    def read_ahead(
        self, rows: Sequence[Sequence[Wanted]], count: int, nbytes: int, compute_seconds: float, worth: float
    ) -> Ahead:
        """Let the reader thread read from slow tiers what a prompt will want.

        Args:
            rows: what is wanted of each unit of work, in order.
            count: units per read.
            nbytes: of a unit's values.
            compute_seconds: what computing one unit takes; 0.0 if that is unknown.
            worth: seconds of waiting from which on it is done.
        """
        slow = self.slow_tiers()
        rows = [far for row in rows if (far := [one for one in row if not self._is_near(one.tier_key, slow)])]
        if max((self.costs.waiting(number, len(rows) * nbytes) for number in slow), default=0.0) <= worth:
            return Ahead()
        read = partial(self._read_tiers, slow, nbytes, compute_seconds, ahead=True)
        parts = [rows[at : at + count] for at in range(0, len(rows), count)]
        return self.ahead.begin(Batch([one for row in part for one in row], len(part) * nbytes, read) for part in parts)

    def _is_near(self, key: bytes, slow: Sequence[int]) -> bool:
        """Whether a result is in the queue, or surely in a tier above the first of ``slow``."""
        if self.queue.get(key) is not None:
            return True
        with suppress(Exception):  # reading from it says what is wrong
            return any(tier.contains(key) for tier in self.tiers[: min(slow, default=0)])
        return False

    def _read(self, number: int, missing: Sequence[Wanted], *, ahead: bool = False) -> None:
        """One batched read of one tier; what does not verify stays missing."""
        stats, started, ran = self.stats[number], time.perf_counter(), time.thread_time()
        if ahead:
            for one in missing:
                one.asked = (*one.asked, number)
        try:
            values = self.tiers[number].get_many([one.tier_key for one in missing])
        except Exception as error:
            stats.errors += 1
            stats.misses += len(missing)
            self._warn(f"tier {stats.name} did not answer ({error})", "read " + stats.name)
            return
        nbytes = 0
        for one, value in zip(missing, values, strict=True):
            if value is None:
                stats.misses += 1
                continue
            try:
                one.payload = one.decode(value)
            except BlockRefused as refused:
                stats.refused += 1
                self._rewrite.add(one.tier_key)
                self._warn(f"tier {stats.name} holds a block that does not verify ({refused})", "refused " + stats.name)
                continue
            stats.hits += 1
            nbytes += len(value)
        if nbytes:
            stats.read_bytes += nbytes
            worked = None if ahead else time.thread_time() - ran
            self.costs.loaded(number, nbytes, time.perf_counter() - started, worked)

    # ---- the end -------------------------------------------------------------------------------

    def flush_tiers(self, deadline: float | None) -> bool:
        """Wait until what is queued is written and safe; whether it is."""
        done = self.queue.flush(deadline)
        if not done:
            return False  # a tier that takes so long has no time for this
        for tier, stats in zip(self.tiers, self.stats, strict=True):
            try:
                within(deadline, tier.flush)
            except Exception as error:
                stats.errors += 1
                self._warn(f"tier {tier.name} did not flush ({error})", "flush " + tier.name)
                done = False
        return done

    def close_tiers(self, deadline: float) -> bool:
        """End both threads and let go of the tiers; whether nothing was lost."""
        done = self.queue.close(deadline)
        self.ahead.close(deadline)
        try:
            within(max(deadline, time.monotonic() + 0.1), self._let_go)
        except TimeoutError as error:
            self._warn(f"tiers did not close ({error})", "close")
            return False
        return done

    def _let_go(self) -> None:
        """Close the tiers that were opened here: tiers handed over as objects belong to whoever made them."""
        for tier in self._own:
            tier.close()

    def _warn(self, message: str, kind: str) -> None:
        """Say each kind of trouble once; the counters have the rest."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"{message}; computed instead, and counted in tier_stats()", KVCacheWarning, stacklevel=2)
