"""Which prompts are computed when: as soon as there is room, in chunks, each shared prefix once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.decoder import Decoder
from kvcache_core.readahead import Ahead
from kvcache_core.stepping import check_chunk

__all__ = ["WEIGHTS_IN_TOKENS", "Job", "PromptQueue", "pack"]

WEIGHTS_IN_TOKENS = 32
"""What a step costs before its first token, reading all weights, in tokens of compute: a prompt waits for another
one's prefix, and rows are padded to a common length, if that saves or costs about this much."""

_HEAD = WEIGHTS_IN_TOKENS
_AHEAD = 8
"""Prompts that are read ahead at a time: enough for one to be there whenever there is room."""


@dataclass(slots=True, eq=False)
class Job:
    """A prompt on its way into the cache.

    Attributes:
        at: the prompt's place among the caller's.
        tokens: the prompt.
        new: tokens that each continuation adds, at most.
        copies: continuations that will fork from it.
        keep: tokens at its end that are not computed here.
        seq: its sequence, once it is admitted.
        ahead: what is read of it while it waits.
    """

    at: int
    tokens: Sequence[int]
    new: int
    copies: int = 1
    keep: int = 0
    seq: Any = None
    ids: NDArray[np.int64] = field(init=False, repr=False)
    head: bytes = field(init=False, repr=False)
    ahead: Ahead | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        self.ids = np.asarray(self.tokens, np.int64)
        self.head = self.ids[:_HEAD].tobytes()

    @property
    def rest(self) -> int:
        """Tokens left to compute."""
        return max(0, len(self.tokens) - self.keep - int(self.seq.length))


class PromptQueue:
    """Prompts that wait, and prompts that are being computed.

    Args:
        decoder: the model.
        jobs: the prompts, in the order they came.
        chunk: tokens of one step over the whole batch, at most; None for no limit.

    Attributes:
        waiting: prompts that wait.
        computing: prompts that are being computed.
        reading: how many wait for what is read of them.

    Raises:
        CacheFull: a prompt that cannot run even alone.
    """

    def __init__(self, decoder: Decoder, jobs: Iterable[Job], chunk: int | None) -> None:
        self._decoder = decoder
        self._chunk = check_chunk(chunk) if decoder.cached else None
        self.waiting = deque(jobs)
        self._all = list(self.waiting)
        self.computing: list[Job] = []
        self.reading = 0
        for job in self.waiting:
            decoder.check_fits(len(job.tokens), job.new, job.copies)

    def admit(self, others: Sequence[tuple[Job, Any]]) -> None:
        """Open the waiting prompts that fit beside ``others``, the (job, sequence) rows that run already.

        A prompt whose prefix another one is computing now waits for it, and lets those behind it pass. So does one
        that is read from slow tiers, while there is anything to compute.
        """
        deferred: list[Job] = []
        self.reading = 0
        while self.waiting and self.reading < _AHEAD:
            job = self.waiting[0]
            if self._leader_is_ahead(job):
                deferred.append(self.waiting.popleft())
                continue
            rows = [*others, *((other, other.seq) for other in self.computing)]
            if rows and self._is_being_read(job):
                self.reading += 1
                deferred.append(self.waiting.popleft())
                continue
            if not self._fits(job, rows):
                break
            self._open(self.waiting.popleft())
        behind = list(islice(self.waiting, _AHEAD - self.reading))
        self.waiting.extendleft(reversed(deferred))
        if others or self.computing:
            for job in behind:
                if not self._leader_is_ahead(job):
                    self._is_being_read(job)

    def _open(self, job: Job) -> None:
        job.seq = self._decoder.open(job.tokens, job.new)
        self.computing.append(job)
        if job.ahead is not None:
            job.ahead.close()

    def _is_being_read(self, job: Job) -> bool:
        """Whether the tiers are still being read for a prompt; begins to when it is first asked."""
        if job.ahead is None:
            job.ahead = self._decoder.prefetch(job.tokens, WEIGHTS_IN_TOKENS)
        return not job.ahead.done

    def _fits(self, job: Job, rows: Sequence[tuple[Job, Any]]) -> bool:
        """Whether there is room beside ``rows``; alone it always fits, or nothing is gained by waiting."""
        if not rows:
            return True
        held = max(min(_common(job, other), int(seq.length)) for other, seq in rows)
        shared = min(held, self._decoder.cached_length(job.tokens)) if held else 0
        # A prompt that is being computed has its continuations still before it.
        computing = {id(other) for other in self.computing}
        running = [
            (seq, len(other.tokens), other.new, other.copies if id(other) in computing else 1) for other, seq in rows
        ]
        return self._decoder.fits(running, (len(job.tokens), job.new, job.copies), shared)

    def _leader_is_ahead(self, job: Job) -> bool:
        """Whether a prompt being computed will leave a good part of this one in the cache."""
        shared = max((_common(job, other) for other in self.computing), default=0)
        if shared < WEIGHTS_IN_TOKENS:
            return False
        return min(shared, len(job.tokens) - 1) - self._decoder.cached_length(job.tokens) >= WEIGHTS_IN_TOKENS

    def step(self, *, greedy: bool) -> list[tuple[Job, Any]]:
        """Compute one chunk; returns the prompts that are complete.

        Args:
            greedy: whether each comes with its next token; otherwise with its logits [V].
        """
        jobs = [job for job in self.computing if job.rest]
        done: list[tuple[Job, Any]] = [(job, None) for job in self.computing if not job.rest]
        if jobs:
            part = [(jobs[at], count) for at, count in pack([job.rest for job in jobs], self._chunk)]
            tokens = [job.tokens[job.seq.length : job.seq.length + count] for job, count in part]
            complete = any(job.rest == count for job, count in part)
            run = self._decoder.step if complete and not greedy else self._decoder.step_greedy
            found = run([job.seq for job, _ in part], tokens)
            done += [(job, row) for (job, _), row in zip(part, found, strict=True) if not job.rest]
        finished = {id(job) for job, _ in done}
        self.computing = [job for job in self.computing if id(job) not in finished]
        return done

    def close(self) -> None:
        """Close what is not complete, and read no more."""
        for job in self.computing:
            job.seq.close()
        for job in self._all:
            if job.ahead is not None:
                job.ahead.close()
        self.computing = []


def pack(rests: Sequence[int], chunk: int | None) -> list[tuple[int, int]]:
    """Rows for one step, as (row, tokens): rows of about equal length, so that little is padded.

    Args:
        rests: tokens left per row, each at least 1.
        chunk: tokens of the step, padding included, at most; None for no limit.

    Example:
        >>> pack([100, 3, 98, 4], 256), pack([2000, 3], 512)
        ([(0, 100), (2, 98)], [(0, 512)])
    """
    order = sorted(range(len(rests)), key=lambda at: -rests[at])
    width = rests[order[0]] if chunk is None else min(rests[order[0]], chunk)
    taken, padding = [(order[0], width)], 0
    for at in order[1:]:
        count = min(rests[at], width)
        padding += width - count
        size = width * (len(taken) + 1)
        if padding > max(WEIGHTS_IN_TOKENS, size // 8) or (chunk is not None and size > chunk):
            break
        taken.append((at, count))
    return taken


def _common(one: Job, other: Job) -> int:
    """Length of the common head; 0 if it is short."""
    if one.head != other.head:
        return 0
    length = min(len(one.ids), len(other.ids))
    differing = np.flatnonzero(one.ids[:length] != other.ids[:length])
    return int(differing[0]) if len(differing) else length
