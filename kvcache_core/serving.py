"""What a cache serves: sequences, steps as transactions, and calls of a model inside ``with cache:``."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvcache_core.activation import ActivationSite, Bypassed
from kvcache_core.errors import CacheFull, InvalidInput, KVCacheWarning
from kvcache_core.frames import Frames, frames_of, padded
from kvcache_core.plan import StepPlan
from kvcache_core.readahead import Ahead
from kvcache_core.sequence import Sequence as CachedSequence
from kvcache_core.types import TokenIds
from kvcache_core.warmstart import WarmStart

__all__ = ["Call", "Serving"]


@dataclass(slots=True)
class Call:
    """One ``model(x)`` under way inside ``with cache:``: its rows as sequences, and their step."""

    seqs: list[CachedSequence]
    plan: StepPlan
    lengths: list[int]


class Serving(WarmStart):
    """The part of :class:`~kvcache_core.frontend.FrontendCache` that opens sequences and serves calls."""

    def open(self, token_ids: TokenIds, *, max_new_tokens: int = 0) -> CachedSequence:
        """Start a sequence with whatever head of ``token_ids`` is cached; step the rest.

        Args:
            token_ids: the prompt; or frames [T, F], for a model attached with ``frames=F``.
            max_new_tokens: reserve room for so many further tokens.

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
        if self.frames is not None:
            found = self._frames_of(token_ids)
            # What else shapes the state, like an encoder's input, is there from the first token on.
            token_ids, given = found.ids, options.get("extra_keys") or {}
            options["extra_keys"] = {at: key + given.get(at, b"") for at, key in found.keys.items()}
        seq = core.open(token_ids, self.salt, **options)
        if self._tiers is not None and core.layout is not None and self._identified is not None:
            self._tiers.serve(core.layout, seq.namespace, self._identified[1], self.salt)
            try:
                self._tiers.promote(seq)
            except BaseException:
                seq.close()
                raise
        return seq

    def prefetch(self, token_ids: TokenIds, worth: int) -> Ahead:
        """Begin to read what the tiers have of a prompt that waits; close what is returned when it is open.

        Args:
            token_ids: the prompt.
            worth: only if it takes as long to wait for the tiers as to compute so many tokens.
        """
        core = self.core
        if self._tiers is None or core.layout is None or self._identified is None:
            return Ahead()
        self._tiers.serve(core.layout, core.namespace, self._identified[1], self.salt)
        return self._tiers.prefetch(token_ids, self.salt, worth)

    @contextmanager
    def transaction(self, seqs: Sequence[CachedSequence], token_ids: Sequence[TokenIds]) -> Iterator[StepPlan]:
        """Plan a step; commit it when the block ends, roll it back when the block raises."""
        core = self.core
        plan = self._plan(seqs, token_ids)
        started = time.perf_counter()
        try:
            yield plan
        except BaseException:
            core.rollback(plan)
            raise
        core.commit(plan)
        self._computed(plan, started)

    def _plan(self, seqs: Sequence[CachedSequence], token_ids: Sequence[TokenIds]) -> StepPlan:
        """Plan a step of token ids, or of frames."""
        if self.frames is None:
            return self.core.plan(seqs, token_ids)
        rows = [self._frames_of(row) for row in token_ids]
        plan = self.core.plan(seqs, [row.ids for row in rows], extra_keys=[row.keys for row in rows])
        plan.frames = padded(rows)
        return plan

    def _frames_of(self, given: Any) -> Frames:
        return frames_of(given, self.frames or 0, self.spec.dtype if self.spec else "float32")

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
                plan = self._plan(seqs, [row[seq.num_cached :] for row, seq in zip(rows, seqs, strict=True)])
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
        vocab = self.spec.vocab_size if self.spec and self.frames is None else None
        if vocab is None or not len(token_ids):
            return
        try:
            largest = max(token_ids)
            too_large = bool(largest >= vocab)
        except (TypeError, ValueError):
            return  # no numbers in one row: opening or stepping says so
        if too_large:
            raise InvalidInput(f"token ids must be 0 .. {vocab - 1} for this model, got {largest}")

    def serve(self, site: ActivationSite, original: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, bool]:
        """``module(*args, **kwargs)`` from its activations; or (what is known of it, False): compute it as outside."""
        try:
            return site.serve(original, args, kwargs), True
        except Bypassed as bypassed:
            self.bypass(0, bypassed.reason, warn=not bypassed.expected)
            return bypassed.output, False
