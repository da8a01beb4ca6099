"""What both adapters' ``KVCache`` are: serving (:mod:`~kvcache_core.serving`), and housekeeping and statistics.

An adapter subclasses :class:`FrontendCache` and supplies the tensors; nothing here knows a framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvcache_core.analysis import Advice
from kvcache_core.budget import Budget, compact_blocks, resize_blocks
from kvcache_core.errors import InvalidInput
from kvcache_core.progress import progress
from kvcache_core.serving import Call, Serving
from kvcache_core.sizes import parse_memory
from kvcache_core.stats import CacheStats
from kvcache_core.stepping import PREFILL_CHUNK
from kvcache_core.tiercosts import TierStats

__all__ = ["Call", "FrontendCache", "parse_memory"]


class FrontendCache(Serving):
    """The base of both adapters' ``KVCache``.

    Args:
        size: capacity in blocks, or in entries for activations. Default 4096 when no ``memory`` is given.
        memory: capacity in bytes instead, as a number or text like ``"2GiB"``: of K/V blocks and activations together.
        block_size: tokens per block.
        dtype: stored dtype of K and V; default is the model's.
        salt: only caches and sequences with equal salt share results.
        tiers: where evicted blocks go and come back from, nearest first: ``"ram:4GiB"``,
            ``"disk:PATH?max=20GiB"``, ``"valkey://HOST:PORT/DB?ttl=SECONDS"`` or tier objects.
        promote: ``"auto"``: tiers are used while loading costs less than recomputing; or ``"always"``.
        write_through: write a block to the tiers that outlive the process as soon as it is full, not only when it is
            evicted: other replicas then find it at once.
        admit: which activations are kept, and which blocks go down to the tiers: ``"all"``,
            :class:`~kvcache_core.admission.Sampled` or :class:`~kvcache_core.admission.AfterSightings`.
        verify: how changed weights are noticed: ``"sample"`` of their content, ``"full"`` (every byte), or
            ``"never"``: only :meth:`invalidate` counts.
        bypass: ``"auto"``: a module whose activations cost more to look up and copy than computing them would take
            is computed without the cache, and looked at again ever less often. To know, such a module is now and
            then computed though its result is there.

    Raises:
        InvalidInput: a size, memory or block size that is no positive amount, or both size and memory; a malformed
            tier.
        TierError: a tier cannot be opened or reached.
    """

    def warm(self, prompts: Sequence[Any], *, bar: bool | None = None) -> int:
        """Compute prompts before traffic comes; returns how many tokens were not cached yet.

        Args:
            prompts: lists of token ids. For activations: batches of inputs, each a tensor, a tuple of arguments or a
                dict of keyword arguments (a list, a data loader, any iterable of them), or one such tensor or dict
                alone; then the number is of samples that were not cached yet.
            bar: whether a progress bar is drawn on standard error; None: where that is a terminal.
        """
        if self._kind == "activation" or (self._kind is None and not _are_prompts(prompts)):
            return self._warm_entries(prompts, bar)
        computed = 0
        self.refresh()
        for prompt in progress(prompts, "warm", show=bar):
            seq = self.open(prompt)
            try:
                rest = prompt[seq.num_cached :]
                computed += len(rest)
                self.step([seq], [rest], prefill_chunk=PREFILL_CHUNK)
            finally:
                seq.close()
        return computed

    def _warm_entries(self, inputs: Any, bar: bool | None) -> int:
        if isinstance(inputs, dict) or hasattr(inputs, "shape"):  # iterated, its rows or names would pass for batches
            inputs = [inputs]
        before = self.sites.entries.miss_entries
        with self:
            for given in progress(inputs, "warm", show=bar):
                if isinstance(given, dict):
                    self.model(**given)
                else:
                    self.model(*(given if isinstance(given, tuple) else (given,)))
        return self.sites.entries.miss_entries - before

    def resize(self, size: int | None = None, *, memory: str | int | None = None) -> None:
        """Change the capacity while it is in use, in blocks or bytes. Shrinking evicts; nothing in use is lost.

        Raises:
            CacheFull: open sequences hold more than that; nothing was changed.
            InvalidInput: no positive amount, or both given.
            OutOfMemory: no memory for arrays of that size beside the present ones; nothing was changed.
        """
        if (size is None) == (memory is None):
            raise InvalidInput(f"give size (blocks) or memory (bytes); got {size!r} and {memory!r}")
        if isinstance(size, str):
            size, memory = None, size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise InvalidInput(f"size must be a whole number of blocks, at least 1; got {size!r}")
        limit = None if memory is None else parse_memory(memory)
        with self.sites.clock.lock:
            self._resize(size, limit)
            self._size, self._memory = size, limit

    def _resize(self, size: int | None, memory: int | None) -> None:
        """The first of the pools and the store to say no has changed nothing."""
        core, entries = self._core, self.sites.entries
        if core is None:
            entries.resize(size, memory=memory)
        elif memory is not None:
            budget = self._budget or Budget(memory, entries, core, self._store)
            budget.resize(memory)
            self._budget = budget
        else:
            resize_blocks(core, self._store, int(size or 0), lambda: entries.resize(size))
            self._budget = None

    def compact(self) -> int:
        """Bring the blocks of open sequences next to each other, for faster attention; returns how many moved.

        For idle moments: it copies the moved blocks, and needs as much of the host's memory beside the cache.

        Raises:
            OutOfMemory: there is not as much; nothing was changed.
            StepError: a step is under way.
        """
        return 0 if self._core is None else compact_blocks(self._core, self._store)

    def clear(self) -> None:
        """Drop everything cached that no open sequence holds."""
        self.sites.clear()
        if self._core is not None:
            self._core.clear()

    def flush(self, timeout: float | None = None, *, everything: bool = False) -> bool:
        """Wait until what was demoted so far is in its tier; whether it is.

        Args:
            timeout: seconds to wait at most.
            everything: first demote all that can be found in the pool and in the RAM tier, down to the first tier
                that outlives the process: another process then finds it.
        """
        return self._tiers is None or self._tiers.flush(timeout, everything=everything)

    def close(self, timeout: float = 5.0) -> bool:
        """Flush everything to the tiers within ``timeout`` seconds and let go of them; whether nothing was lost.

        The cache itself goes on without tiers. Also done when the cache is forgotten or the process ends.
        """
        if self._tiers is None:
            return True
        self._closer.detach()
        tiers, self._tiers = self._tiers, None
        return tiers.close(timeout)

    def tier_stats(self) -> list[TierStats]:
        """What each tier has done for this cache, nearest first."""
        return [] if self._tiers is None else [replace(stats) for stats in self._tiers.stats]

    def record(self, accesses: int = 100_000) -> None:
        """Remember the last so many accesses to activations, for :meth:`advice`; 0 stops it."""
        self.sites.entries.record(accesses)

    def advice(self) -> Advice:
        """Which size pays for activations, by the accesses since :meth:`record`; print it.

        Raises:
            UsageError: none are recorded.
        """
        return self.sites.entries.advice(max((site.worth.row_seconds for site in self.sites), default=0.0))

    def stats(self, *, advice: bool = False) -> CacheStats:
        """Counters and contents; zeros before the first use. ``print`` shows those that are not zero.

        Args:
            advice: also say which size pays for activations, as :meth:`advice` does.

        Raises:
            UsageError: advice without recorded accesses: call :meth:`record` first.
        """
        entries, skipped, reasons = self.sites.entries, self.sites.skipped, dict(self._bypass_reasons)
        if skipped:
            reasons["the cache costs more than it saves"] = skipped
        if self._core is None:
            stats = CacheStats(block_size=self._block_size, num_blocks=self._size or 0)
        else:
            stats = replace(self._core.stats(), bytes=self._store.nbytes)
        return replace(
            stats,
            bytes=stats.bytes + entries.bytes,
            bypassed_calls=self._bypassed_calls + skipped,
            bypassed_tokens=self._bypassed_tokens,
            saved_output_tokens=self._saved_output_tokens,
            **({} if self._tiers is None else self._tiers.counters()),
            entries=len(entries),
            entry_bytes=entries.bytes,
            memory_moves=0 if self._budget is None else self._budget.moves,
            failed_memory_moves=0 if self._budget is None else self._budget.failed_moves,
            hit_entries=entries.hit_entries,
            miss_entries=entries.miss_entries,
            evicted_entries=entries.evicted_entries,
            refused_entries=entries.refused_entries,
            seconds_saved=self.sites.seconds_saved,
            seconds_spent=self.sites.seconds_spent,
            bypass_reasons=reasons,
            advice=str(self.advice()) if advice else "",
        )


def _are_prompts(prompts: Sequence[Any]) -> bool:
    """Whether each is a list of token ids. Only lists are looked into: a generator would lose what was looked at."""
    return isinstance(prompts, list | tuple) and all(
        isinstance(prompt, list | tuple) and all(isinstance(token, int) for token in prompt) for prompt in prompts
    )
