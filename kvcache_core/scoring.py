"""How likely continuations are: what evaluation harnesses, rerankers and classifiers by prompt ask for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.cache import token_array
from kvcache_core.decoder import Decoder
from kvcache_core.errors import InvalidInput
from kvcache_core.scheduling import Job, PromptQueue, pack
from kvcache_core.stepping import PREFILL_CHUNK

__all__ = ["Score", "score_pairs"]

_SCORED_AT_ONCE = 256
"""Tokens whose logits are in memory at once."""

_FORKS_AT_ONCE = 16
"""Continuations of one prompt that are open at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """How likely one continuation is.

    Attributes:
        token_log_likelihoods: float64 [T], natural log-probability of each of its tokens, given all before it.
        greedy_tokens: int64 [T], the most likely token in the place of each.
        is_greedy: whether greedy decoding would give exactly this continuation.
    """

    token_log_likelihoods: NDArray[np.float64]
    greedy_tokens: NDArray[np.int64]
    is_greedy: bool

    @property
    def log_likelihood(self) -> float:
        """Natural log-probability of the whole continuation: the sum over its tokens."""
        return float(self.token_log_likelihoods.sum())


@dataclass(slots=True)
class _Row:
    """One continuation being scored.

    Attributes:
        tokens: what is left to append: the last token of the prompt, and all but the last of the continuation.
        targets: the continuation.
        found: what each step gave: log-probabilities and most likely tokens.
    """

    at: int
    seq: Any
    tokens: Sequence[int]
    targets: Sequence[int]
    found: list[tuple[NDArray[np.float64], NDArray[np.int64]]] = field(default_factory=list)

    def part(self, count: int) -> Sequence[int]:
        """The targets that stand behind the next ``count`` tokens."""
        prompt_tokens = max(0, len(self.tokens) - len(self.targets))
        return self.targets[: max(0, count - prompt_tokens)]


def score_pairs(
    decoder: Decoder,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    prefill_chunk: int | None = PREFILL_CHUNK,
) -> list[Score]:
    """The log-likelihood of each continuation behind its prompt, in the order of the pairs.

    Equal prompts and shared prefixes are computed once; continuations of about equal length go through the model
    together. Logits exist for the continuations alone, at most 256 tokens of them at a time.

    Args:
        decoder: the model.
        pairs: (prompt, continuation), token ids, at least one each.
        prefill_chunk: prompt tokens per step over the whole batch, at most; None for no limit.

    Raises:
        InvalidInput: an empty prompt or continuation, or ids that are no integers or outside the vocabulary.
        CacheFull: a pair that cannot run even alone; raised before anything is computed.
    """
    checked = [_checked_pair(decoder, at, pair) for at, pair in enumerate(pairs)]
    batch = _Batch(decoder, checked, prefill_chunk)
    try:
        batch.run()
    finally:
        batch.close()
    return [batch.scores[at] for at in range(len(checked))]


def _checked_pair(
    decoder: Decoder, at: int, pair: tuple[Sequence[int], Sequence[int]]
) -> tuple[tuple[int, ...], list[int]]:
    try:
        prompt, continuation = pair
    except (TypeError, ValueError):
        raise InvalidInput(f"pair {at} must be (prompt, continuation), two lists of token ids; got {pair!r}") from None
    if not len(continuation):
        raise InvalidInput(f"the continuation of pair {at} is empty: there is nothing to score")
    if not len(prompt):
        raise InvalidInput(
            f"the prompt of pair {at} is empty: a model gives probabilities behind a token; start with one, for "
            "example the beginning-of-text token"
        )
    result = tuple(token_array(prompt, f"prompt {at}")), list(token_array(continuation, f"continuation {at}"))
    for tokens in result:
        decoder.check_tokens(tokens)
    return result


class _Batch:
    """Prompts and their continuations, computed and scored."""

    def __init__(
        self, decoder: Decoder, pairs: Sequence[tuple[tuple[int, ...], list[int]]], prefill_chunk: int | None
    ) -> None:
        self._decoder = decoder
        self._continuations = [continuation for _, continuation in pairs]
        of_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for at, (prompt, _) in enumerate(pairs):
            of_prompt[prompt].append(at)
        self._members: list[list[int]] = []
        jobs: list[Job] = []
        for prompt, members in of_prompt.items():
            for first in range(0, len(members), _FORKS_AT_ONCE):
                part = members[first : first + _FORKS_AT_ONCE]
                longest = max(len(self._continuations[at]) for at in part)
                # The last token waits for the continuation: what follows it is scored. Without a cache all wait.
                keep = 1 if decoder.cached else len(prompt)
                jobs.append(Job(len(jobs), prompt, longest, len(part), keep))
                self._members.append(part)
        self._queue = PromptQueue(decoder, jobs, prefill_chunk)
        self._rows: list[tuple[Job, _Row]] = []
        self.scores: dict[int, Score] = {}

    def run(self) -> None:
        """Until everything is scored."""
        queue = self._queue
        while queue.waiting or queue.computing or self._rows:
            queue.admit([(job, row.seq) for job, row in self._rows])
            if queue.computing:
                for job, _ in queue.step(greedy=True):
                    self._fork(job)
            else:
                self._score()

    def close(self) -> None:
        """Close whatever an error has left open."""
        self._queue.close()
        for _, row in self._rows:
            row.seq.close()
        self._rows = []

    def _fork(self, job: Job) -> None:
        """A prompt is complete: one row for each of its continuations."""
        members = self._members[job.at]
        seqs = [job.seq]
        try:
            seqs += [job.seq.fork() for _ in members[1:]]
        except BaseException:
            for seq in seqs:
                seq.close()
            raise
        for at, seq in zip(members, seqs, strict=True):
            continuation = self._continuations[at]
            tokens = [*job.tokens[seq.length :], *continuation[:-1]]
            self._rows.append((job, _Row(at, seq, tokens, continuation)))

    def _score(self) -> None:
        """One step over rows of about equal length."""
        chosen = pack([len(row.tokens) for _, row in self._rows], _SCORED_AT_ONCE if self._decoder.cached else None)
        part = [(self._rows[at][1], count) for at, count in chosen]
        targets = [row.part(count) for row, count in part]
        found = self._decoder.step_scores(
            [row.seq for row, _ in part], [row.tokens[:count] for row, count in part], targets
        )
        done = set()
        for (row, count), behind, result in zip(part, targets, found, strict=True):
            row.found.append(result)
            row.tokens, row.targets = row.tokens[count:], row.targets[len(behind) :]
            if not row.tokens:
                self.scores[row.at] = self._finished(row)
                row.seq.close()
                done.add(row.at)
        self._rows = [(job, row) for job, row in self._rows if row.at not in done]

    def _finished(self, row: _Row) -> Score:
        scores, greedy = (np.concatenate(parts) for parts in zip(*row.found, strict=True))
        return Score(scores, greedy, greedy.tolist() == self._continuations[row.at])
