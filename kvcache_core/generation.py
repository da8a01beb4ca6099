"""Generating tokens: greedy, sampled, several continuations and streaming, over any framework's step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcache_core.cache import token_array
from kvcache_core.decoder import Decoder
from kvcache_core.errors import CacheFull, InvalidInput
from kvcache_core.options import GenerateOptions
from kvcache_core.sampling import pick
from kvcache_core.scheduling import Job, PromptQueue
from kvcache_core.speculation import Drafter, worth_verifying

__all__ = ["generate_tokens", "stream_tokens"]

_STEPS_AT_ONCE = 32
"""Greedy tokens that the decoder is asked for at once."""


@dataclass(slots=True)
class _Row:
    """One continuation that is running.

    Attributes:
        pending: tokens of the row that its sequence does not hold yet; the last one generated is always there.
    """

    job: Job
    seq: Any
    random: np.random.Generator
    new: list[int]
    pending: list[int]
    drafter: Drafter | None = None

    @property
    def left(self) -> int:
        """Tokens it may still get."""
        return self.job.new - len(self.new)

    def append(self, tokens: Sequence[int]) -> None:
        """Tokens that were chosen, the last of which is not in the sequence yet."""
        self.new += tokens
        self.pending = [tokens[-1]]
        if self.drafter is not None:
            self.drafter.extend(tokens)


def generate_tokens(decoder: Decoder, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> list[list[int]]:
    """Continue each prompt; returns the new tokens, ``options.n`` lists per prompt, prompt by prompt.

    Continuous batching: rows are ragged and leave when they end; a prompt joins as soon as there is room. Prompts are
    computed in chunks, a prefix that they share once. Rows that run already take a step between two chunks.

    Raises:
        InvalidInput: an empty prompt or a token that is no integer.
        CacheFull: a prompt that cannot run even alone; raised before anything is computed.
    """
    checked = [list(token_array(prompt, f"prompt {at}")) for at, prompt in enumerate(prompts)]
    limits = options.limits(len(checked))
    jobs = [Job(at, tokens, limits[at], options.n) for at, tokens in enumerate(checked)]
    batch = _Batch(decoder, PromptQueue(decoder, jobs, options.prefill_chunk), options)
    try:
        batch.run()
    finally:
        batch.close()
    return [batch.results[at, sample] for at in range(len(checked)) for sample in range(options.n)]


class _Batch:
    """The rows of one :func:`generate_tokens`: computed, running, ended."""

    def __init__(self, decoder: Decoder, queue: PromptQueue, options: GenerateOptions) -> None:
        self._decoder = decoder
        self._queue = queue
        self._options = options
        self._greedy = not options.sampling.temperature
        self._speculation = options.speculation if decoder.cached else None
        self._rows: list[_Row] = []
        self._joining: list[_Row] = []
        self.results: dict[tuple[int, int], list[int]] = {}

    def run(self) -> None:
        """Until every row has ended."""
        queue = self._queue
        while queue.waiting or queue.computing or self._joining or self._rows:
            self._turn(_STEPS_AT_ONCE)

    def stream(self) -> Iterator[int]:
        """The tokens of the only row, as they come."""
        given = 0
        while self._queue.waiting or self._queue.computing or self._joining or self._rows:
            self._turn(1)
            new = self.results.get((0, 0), [])
            yield from new[given:]
            given = len(new)

    def _turn(self, steps: int) -> None:
        """A chunk of the prompts that can be computed, and then a step of the rows that ran before."""
        queue = self._queue
        queue.admit([(row.job, row.seq) for row in (*self._rows, *self._joining)])
        if queue.computing:
            self._join_all(queue.step(greedy=self._greedy))
            self._joining = self._running(self._joining)
            steps = 1
        else:
            steps = 1 if queue.reading else steps
            # Rows whose prompts were computed together start together: a larger batch costs little more.
            self._rows += self._joining
            self._joining = []
        if self._rows:
            self._advance(steps)
            self._rows = self._running(self._rows)

    def close(self) -> None:
        """Close whatever an error has left open."""
        self._queue.close()
        for row in (*self._rows, *self._joining):
            row.seq.close()
        self._rows, self._joining = [], []

    def _join_all(self, complete: list[tuple[Job, Any]]) -> None:
        """These prompts are complete: their continuations run from now on, or all of them are closed."""
        try:
            while complete:
                self._join(*complete.pop(0))
        except BaseException:
            for job, _ in complete:
                job.seq.close()
            raise

    def _join(self, job: Job, found: Any) -> None:
        """A prompt is complete: choose the first token of each of its continuations."""
        seqs = [job.seq]
        try:
            seqs += [job.seq.fork() for _ in range(self._options.n - 1)]
            self._joining += [self._start(job, sample, seq, found) for sample, seq in enumerate(seqs)]
        except BaseException:
            for seq in seqs:
                seq.close()
            raise

    def _start(self, job: Job, sample: int, seq: Any, found: Any) -> _Row:
        """The row of one continuation, with its first token."""
        random = self._options.sampling.generator(job.at * self._options.n + sample)
        token = int(found) if self._greedy else pick(found, self._options.sampling, random)
        row = _Row(job, seq, random, [token], [token])
        if self._speculation is not None:
            row.drafter = Drafter([*job.tokens, token], self._speculation)
        self.results[job.at, sample] = row.new
        return row

    def _running(self, rows: list[_Row]) -> list[_Row]:
        """Close the rows that have ended; returns the others."""
        running = []
        for row in rows:
            if row.new[-1] in self._options.eos_ids or not row.left:
                row.seq.close()
            else:
                running.append(row)
        return running

    def _advance(self, steps: int) -> None:
        """At least one further token for every row; up to ``steps`` when nothing has to be decided in between."""
        rows = self._rows
        drafters = [row.drafter for row in rows if row.drafter is not None]
        if drafters:
            drafts = [drafter.draft(row.left - 1) for row, drafter in zip(rows, drafters, strict=True)]
            if worth_verifying(drafts, [drafter.rate for drafter in drafters]) and self._verify(drafts):
                return
            if any(drafter.hopeful for drafter in drafters):
                steps = 1  # a draft may be found behind the next token
        seqs, pending = [row.seq for row in rows], [row.pending for row in rows]
        if self._greedy:
            count = min(steps, *(row.left for row in rows))
            found = self._decoder.decode_greedy(seqs, pending, count, self._options.eos_ids)
            for row, tokens in zip(rows, found, strict=True):
                row.append(tokens.tolist())
        else:
            for row, scores in zip(rows, self._decoder.step(seqs, pending), strict=True):
                row.append([pick(scores, self._options.sampling, row.random)])

    def _verify(self, drafts: Sequence[list[int]]) -> bool:
        """One step over every row's draft; what the model would not have chosen is taken back.

        Returns:
            False if there is no room for the drafts, with nothing changed: admission counts plain decoding, and in a
            layer with a window a draft takes more than that.
        """
        rows = self._rows
        run = self._decoder.step_greedy_all if self._greedy else self._decoder.step_all
        tokens = [row.pending + draft for row, draft in zip(rows, drafts, strict=True)]
        try:
            found = run([row.seq for row in rows], tokens)
        except CacheFull:
            return False
        for row, draft, all_scores in zip(rows, drafts, found, strict=True):
            chosen = self._accept(row, draft, all_scores[len(row.pending) - 1 :])
            if row.drafter is not None:
                row.drafter.learn(len(draft), len(chosen) - 1)
            row.append(chosen)
            self._take_back(row, len(draft) - len(chosen) + 1)
        return True

    def _accept(self, row: _Row, draft: Sequence[int], found: Any) -> list[int]:
        """The tokens that plain decoding would have chosen, up to the first that was not drafted.

        Args:
            row: the row; a sampled token takes one number of its random stream, as in plain decoding.
            draft: the drafted tokens.
            found: greedy tokens [draft + 1], or logits [draft + 1, V] when sampling.
        """
        chosen: list[int] = []
        for at, scores in enumerate(found):
            token = int(scores) if self._greedy else pick(scores, self._options.sampling, row.random)
            chosen.append(token)
            if at == len(draft) or token != draft[at] or token in self._options.eos_ids:
                break
        return chosen

    def _take_back(self, row: _Row, count: int) -> None:
        """Forget the last ``count`` tokens of the row's sequence."""
        if not count:
            return
        try:
            row.seq.truncate(row.seq.length - count)
        except InvalidInput:
            # A window layer has lost what it would see again: start anew from what is cached.
            tokens = [*row.job.tokens, *row.new]
            old, row.seq = row.seq, self._decoder.open(tokens[:-1], row.left)
            row.pending = tokens[row.seq.length :]
            old.close()


def stream_tokens(decoder: Decoder, prompt: Sequence[int], options: GenerateOptions) -> Iterator[int]:
    """Yield one continuation token by token. Closing the iterator closes its sequence.

    Raises:
        InvalidInput, CacheFull: as :func:`generate_tokens`, at the first token.
    """
    if options.n != 1 or options.num_beams != 1:
        raise InvalidInput("streaming gives one continuation: n and num_beams must be 1")
    tokens = list(token_array(prompt, "the prompt"))
    batch = _Batch(decoder, PromptQueue(decoder, [Job(0, tokens, *options.limits(1))], options.prefill_chunk), options)
    try:
        yield from batch.stream()
    finally:
        batch.close()
