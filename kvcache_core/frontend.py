"""What the adapters' caches share: ``with cache:``, transactions, housekeeping and statistics.

An adapter subclasses :class:`FrontendCache` and supplies the tensors; nothing here knows a framework.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvcache_core.activation import ActivationSite, Bypassed
from kvcache_core.analysis import Advice
from kvcache_core.errors import CacheFull, InvalidInput, KVCacheWarning
from kvcache_core.plan import StepPlan
from kvcache_core.sequence import Sequence as CachedSequence
from kvcache_core.sizes import parse_memory
from kvcache_core.stats import CacheStats
from kvcache_core.stepping import PREFILL_CHUNK
from kvcache_core.tiercosts import TierStats
from kvcache_core.types import TokenIds
from kvcache_core.warmstart import WarmStart

__all__ = ["Call", "FrontendCache", "parse_memory"]


@dataclass(slots=True)
class Call:
    """One ``model(x)`` under way inside ``with cache:``: its rows as sequences, and their step."""

    seqs: list[CachedSequence]
    plan: StepPlan
    lengths: list[int]


class FrontendCache(WarmStart):
    """The base of both adapters' ``KVCache``.

    Args:
        size: capacity in blocks, or in entries for activations. Default 4096 when no ``memory`` is given.
        memory: capacity in bytes instead, as a number or text like ``"2GiB"``.
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

    # ---- sequences and steps -------------------------------------------------------------------

    def open(self, token_ids: TokenIds, *, max_new_tokens: int = 0) -> CachedSequence:
        """Start a sequence with whatever head of ``token_ids`` is cached; step the rest.

        Raises:
            InvalidInput: no tokens, or ids that are no integers or outside the vocabulary.
        """
        self.refresh()
        return self.open_fresh(token_ids, max_new_tokens)

    def open_fresh(self, token_ids: TokenIds, max_new_tokens: int = 0) -> CachedSequence:
        """:meth:`open` for a caller that has just called :meth:`refresh`."""
        self.check_vocabulary(token_ids)
        return self._open(token_ids, max_new_tokens=max_new_tokens)

    def _open(self, token_ids: TokenIds, **options: Any) -> CachedSequence:
        """Open a sequence in the core; what the tiers hold behind its match comes up."""
        core = self.core
        seq = core.open(token_ids, self.salt, **options)
        if self._tiers is not None and core.layout is not None and self._identified is not None:
            self._tiers.serve(core.layout, seq.namespace, self._identified[1], self.salt)
            try:
                self._tiers.promote(seq)
            except BaseException:
                seq.close()
                raise
        return seq

    @contextmanager
    def transaction(self, seqs: Sequence[CachedSequence], token_ids: Sequence[TokenIds]) -> Iterator[StepPlan]:
        """Plan a step; commit it when the block ends, roll it back when the block raises."""
        core = self.core
        plan = core.plan(seqs, token_ids)
        started = time.perf_counter()
        try:
            yield plan
        except BaseException:
            core.rollback(plan)
            raise
        core.commit(plan)
        self._computed(plan, started)

    def _computed(self, plan: StepPlan, started: float) -> None:
        """Tell the tiers what computing costs."""
        if self._tiers is not None:
            seconds = time.perf_counter() - started
            self._tiers.computed(int(plan.counts.sum()), int(plan.counts.max()), seconds)

    @contextmanager
    def call(self, rows: Sequence[TokenIds], extra_keys: Sequence[bytes] | None = None) -> Iterator[Call | None]:
        """One ``model(x)``: open every row, plan what is missing, and publish it when the block ends.

        ``extra_keys``: per row, what besides the token ids its state depends on.

        Yields None when there is no room: the caller then computes as outside.
        """
        core = self.core
        outputs = self.outputs == "all"
        seqs: list[CachedSequence] = []
        try:
            for at, row in enumerate(rows):
                extra = None if extra_keys is None else {0: extra_keys[at]}
                seqs.append(self._open(row, outputs=outputs, extra_keys=extra))
            lengths = [len(row) for row in rows]
            try:
                plan = core.plan(seqs, [row[seq.num_cached :] for row, seq in zip(rows, seqs, strict=True)])
            except CacheFull as full:
                self.bypass(sum(lengths), f"the cache has no room for it ({full})")
                yield None
                return
            started = time.perf_counter()
            try:
                yield Call(seqs, plan, lengths)
            except BaseException:
                core.rollback(plan)
                raise
            core.commit(plan)
            self._computed(plan, started)
            if outputs:
                self._saved_output_tokens += sum(seq.num_cached for seq in seqs)
        finally:
            for seq in seqs:
                core.close(seq)

    def bypass(self, tokens: int, reason: str, *, warn: bool = True) -> None:
        """Count a call that is computed as outside, and say so once per reason."""
        self._bypassed_calls += 1
        self._bypassed_tokens += tokens
        kind = reason.split("(", 1)[0].strip()
        self._bypass_reasons[kind] += 1
        if warn and kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"computed without the cache: {reason}", KVCacheWarning, stacklevel=3)

    def check_vocabulary(self, token_ids: TokenIds) -> None:
        """Raise InvalidInput for ids that the model's embedding does not have."""
        self._prepare()
        vocab = self.spec.vocab_size if self.spec else None
        if vocab is None or not len(token_ids):
            return
        try:
            largest = max(token_ids)
            too_large = bool(largest >= vocab)
        except (TypeError, ValueError):
            return  # no numbers in one row: opening or stepping says so
        if too_large:
            raise InvalidInput(f"token ids must be 0 .. {vocab - 1} for this model, got {largest}")

    # ---- housekeeping --------------------------------------------------------------------------

    def serve(self, site: ActivationSite, original: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, bool]:
        """``module(*args, **kwargs)`` from its activations; or (what is known of it, False): compute it as outside."""
        try:
            return site.serve(original, args, kwargs), True
        except Bypassed as bypassed:
            self.bypass(0, bypassed.reason, warn=not bypassed.expected)
            return bypassed.output, False

    def warm(self, prompts: Sequence[Any]) -> int:
        """Compute prompts before traffic comes; returns how many tokens were not cached yet.

        For activations: inputs, each a tensor, a tuple of arguments or a dict of keyword arguments; returns how
        many samples were not cached yet.
        """
        if self._kind == "activation" or (self._kind is None and not _are_prompts(prompts)):
            return self._warm_entries(prompts)
        computed = 0
        self.refresh()
        for prompt in prompts:
            seq = self.open(prompt)
            try:
                rest = prompt[seq.num_cached :]
                computed += len(rest)
                self.step([seq], [rest], prefill_chunk=PREFILL_CHUNK)
            finally:
                seq.close()
        return computed

    def _warm_entries(self, inputs: Sequence[Any]) -> int:
        before = self.sites.entries.miss_entries
        with self:
            for given in inputs:
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
        """
        if (size is None) == (memory is None):
            raise InvalidInput(f"give size (blocks) or memory (bytes); got {size!r} and {memory!r}")
        if isinstance(size, str):
            size, memory = None, size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise InvalidInput(f"size must be a whole number of blocks, at least 1; got {size!r}")
        self.sites.entries.resize(size, memory=None if memory is None else parse_memory(memory))
        if self._core is None:
            self._size, self._memory = size, None if memory is None else parse_memory(memory)
            return
        if memory is not None and self._core.layout is not None:
            size = self._blocks_in(self._core.layout, parse_memory(memory))
        with self._core.lock:
            results = self._core.resize(int(size or 0))
            self._store.resize(int(size or 0), [result.moves for result in results])

    def compact(self) -> int:
        """Bring the blocks of open sequences next to each other, for faster attention; returns how many moved.

        For idle moments: it copies the moved blocks, and needs as much room beside the cache while it does.
        """
        if self._core is None:
            return 0
        with self._core.lock:
            moves = [result.moves for result in self._core.compact()]
            for number, found in enumerate(moves):
                self._store.copy_blocks(number, np.array(list(found.items()), np.int64).reshape(-1, 2))
        return sum(map(len, moves))

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

    def stats(self) -> CacheStats:
        """Counters and contents; zeros before the first use."""
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
            hit_entries=entries.hit_entries,
            miss_entries=entries.miss_entries,
            evicted_entries=entries.evicted_entries,
            refused_entries=entries.refused_entries,
            seconds_saved=self.sites.seconds_saved,
            seconds_spent=self.sites.seconds_spent,
            bypass_reasons=reasons,
        )


def _are_prompts(prompts: Sequence[Any]) -> bool:
    """Whether each is a list of token ids."""
    return all(
        isinstance(prompt, list | tuple) and all(isinstance(token, int) for token in prompt) for prompt in prompts
    )
