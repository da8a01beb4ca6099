"""KerasHub's decoding loops over a cache: the same columns, the same sampler, the same choices.

KerasHub fills a rectangle of tokens column by column, from the shortest prompt's end on; a row that still has a given
token there keeps it. The loops below fill the same columns. They compute less: a prompt in one step, from what is
cached.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops
from numpy.typing import NDArray

from kvcache_keras.cache import KVCache

__all__ = ["Request", "Rows", "beam_search", "sample"]

_AT_ONCE = 32
"""Greedy tokens that the cache is asked for at once."""
_WORTH_A_WAVE = 32
"""Tokens of shared prefix for which a prompt waits for another one's."""


@dataclass
class Request:
    """One batch while it is filled.

    Args:
        tokens: int64 [B, L], padded on the right; filled in place.
        mask: bool [B, L], where a token is given.
        stop: tokens that end a row; None to fill all columns.
    """

    tokens: NDArray[np.int64]
    mask: NDArray[np.bool_]
    stop: frozenset[int] | None

    @property
    def width(self) -> int:
        """L."""
        return int(self.tokens.shape[1])

    @property
    def is_padded_right(self) -> bool:
        """Whether every row starts with at least one given token and has no holes."""
        lengths = self.mask.sum(axis=1)
        return bool(lengths.all() and (self.mask == (np.arange(self.width) < lengths[:, None])).all())

    def blocks(self, beams: int, block_size: int) -> int:
        """Blocks of full attention that all rows take at most if nothing is shared but beams' prompts."""
        total = -(-self.width // block_size) * len(self.tokens)
        own = -(-(self.width - min(self.lengths)) // block_size) + 1
        return total + own * len(self.tokens) * (beams - 1)

    @property
    def is_done(self) -> bool:
        """Whether nothing is to be filled: no column is free, or every row has ended."""
        return min(self.lengths) >= self.width or self.ended()

    @property
    def lengths(self) -> list[int]:
        """Given tokens per row."""
        return [int(length) for length in self.mask.sum(axis=1)]

    def prompt(self, row: int) -> list[int]:
        """A row's given tokens."""
        result: list[int] = self.tokens[row, : self.lengths[row]].tolist()
        return result

    def ended(self) -> bool:
        """Whether every row has a stop token that was not given."""
        if self.stop is None:
            return False
        return bool((np.isin(self.tokens, list(self.stop)) & ~self.mask).any(axis=1).all())


class Rows:
    """The sequences of a batch's rows, by row number.

    Args:
        cache: where they lie.
        salts: one per row; default the cache's.
        bind: called with the rows of each step before it.
    """

    def __init__(
        self, cache: KVCache, salts: Sequence[bytes] | None = None, bind: Callable[[list[int]], None] | None = None
    ) -> None:
        self._cache = cache
        self._salts = salts
        self._bind = bind or (lambda rows: None)

    def open(self, row: int, tokens: list[int], new: int) -> Any:
        """A sequence with what is cached of a row's prompt."""
        self._cache.check_vocabulary(tokens)
        return self._cache.core.open(tokens, self._salt(row), max_new_tokens=new)

    def cached_length(self, row: int, tokens: list[int]) -> int:
        """How many leading tokens are cached now."""
        return self._cache.core.cached_length(tokens, self._salt(row))

    def step(self, rows: list[int], seqs: Sequence[Any], tokens: Sequence[list[int]]) -> NDArray[Any]:
        """Logits [B, V] behind each sequence's last token."""
        self._bind(rows)
        result: NDArray[Any] = self._cache.step(seqs, tokens)
        return result

    def decode_greedy(
        self, seqs: Sequence[Any], tokens: Sequence[list[int]], count: int, stop: Collection[int]
    ) -> NDArray[np.int64]:
        """Up to ``count`` greedy tokens [B, n] of all rows."""
        self._bind(list(range(len(seqs))))
        return self._cache.decode_greedy(seqs, tokens, count, stop)

    def _salt(self, row: int) -> bytes:
        return self._cache.salt if self._salts is None else self._salts[row]


def sample(rows: Rows, request: Request, sampler: Any) -> None:
    """Fill the request with a sampler that chooses each token from one row of probabilities.

    Raises:
        CacheFull: no room; nothing of it stays open.
    """
    lengths, tokens, mask = request.lengths, request.tokens, request.mask
    greedy = type(sampler).__name__ == "GreedySampler" and type(sampler).__module__.startswith("keras_hub.")
    column = min(lengths)
    seqs: list[Any] = []
    try:
        logits = _prefill(rows, request, seqs)
        while column < request.width and not request.ended():
            running = [row for row, length in enumerate(lengths) if length < column]
            if greedy and len(running) == len(seqs):
                count = min(_AT_ONCE, request.width - column)
                last = tokens[:, column - 1 : column].tolist()
                chosen = rows.decode_greedy(seqs, last, count, request.stop or ())
                tokens[:, column : column + chosen.shape[1]] = chosen
                column += chosen.shape[1]
                continue
            if running:
                last = tokens[running, column - 1 : column].tolist()
                logits[running] = rows.step(running, [seqs[row] for row in running], last)
            choice = np.asarray(sampler.get_next_token(sampler.compute_probabilities(tf.constant(logits))))
            tokens[:, column] = np.where(mask[:, column], tokens[:, column], choice)
            column += 1
    finally:
        for seq in seqs:
            seq.close()


def _prefill(rows: Rows, request: Request, seqs: list[Any]) -> NDArray[Any]:
    """Open all rows into ``seqs`` and compute their prompts; returns the logits [B, V] behind them."""
    prompts = [request.prompt(row) for row in range(len(request.tokens))]
    logits: dict[int, NDArray[Any]] = {}
    opened: dict[int, Any] = {}
    try:
        while len(logits) < len(prompts):
            wave = _wave(rows, prompts, [row for row in range(len(prompts)) if row not in logits])
            for row in wave:
                opened[row] = rows.open(row, prompts[row], request.width - len(prompts[row]))
            news = [prompts[row][opened[row].num_cached :] for row in wave]
            logits |= dict(zip(wave, rows.step(wave, [opened[row] for row in wave], news), strict=True))
    except BaseException:
        for seq in opened.values():
            seq.close()
        raise
    seqs += [opened[row] for row in range(len(prompts))]
    return np.stack([logits[row] for row in range(len(prompts))])


def _wave(rows: Rows, prompts: Sequence[list[int]], waiting: Sequence[int]) -> list[int]:
    """Rows to compute now: those that no other one of them computes a longer prefix for."""
    wave: list[int] = []
    for row in waiting:
        shared = max((_common(prompts[row], prompts[other]) for other in wave), default=0)
        if min(shared, len(prompts[row]) - 1) - rows.cached_length(row, prompts[row]) < _WORTH_A_WAVE:
            wave.append(row)
    return wave


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common head."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(np.asarray(one[:length]) != np.asarray(other[:length]))
    return int(differing[0]) if len(differing) else length


def beam_search(rows: Rows, request: Request, sampler: Any) -> None:
    """Fill the request with KerasHub's beam search: every row's beams stay ``num_beams``, the best one is taken.

    Raises:
        CacheFull: no room; nothing of it stays open.
    """
    beams, width, column = sampler.num_beams, request.width, min(request.lengths)
    search = Request(request.tokens.repeat(beams, axis=0), request.mask.repeat(beams, axis=0), request.stop)
    scores = np.tile(np.array([0.0] + [-1e9] * (beams - 1), np.float32), len(request.tokens))
    seqs: list[Any] = []
    try:
        heads = Request(request.tokens, request.mask & (np.arange(width) < column), request.stop)
        logits = _prefill(rows, heads, seqs).repeat(beams, axis=0)
        seqs[:] = [heir for seq in seqs for heir in (seq, *(seq.fork() for _ in range(beams - 1)))]
        first, owners = column, np.arange(len(seqs)) // beams
        while column < width and not search.ended():
            if column > first:
                logits = rows.step(owners.tolist(), seqs, search.tokens[:, column - 1 : column].tolist())
            scores, parents, choice = _best(sampler, logits, scores, beams)
            seqs[:] = _inherit(seqs, parents)
            search.tokens = search.tokens[parents]
            given = search.mask[:, column]
            search.tokens[:, column] = np.where(given, search.tokens[:, column], choice)
            column += 1
    finally:
        for seq in seqs:
            seq.close()
    best = scores.reshape(-1, beams).argmax(axis=1) + np.arange(len(request.tokens)) * beams
    request.tokens[:] = search.tokens[best]


def _best(
    sampler: Any, logits: NDArray[Any], scores: NDArray[np.float32], beams: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """The ``beams`` best continuations of each row, flat over rows: scores, the beams they continue, tokens."""
    total = ops.log(sampler.compute_probabilities(tf.constant(logits))) + scores[:, None]
    vocab = total.shape[1]
    best, places = ops.top_k(ops.reshape(total, (-1, beams * vocab)), k=beams, sorted=False)
    places = np.asarray(places, np.int64)
    parents = places // vocab + np.arange(len(places))[:, None] * beams
    return np.asarray(best).ravel(), parents.ravel(), (places % vocab).ravel()


def _inherit(seqs: Sequence[Any], parents: NDArray[np.int64]) -> list[Any]:
    """One sequence per new beam: a parent's first heir takes it over, others fork it; the rest is closed."""
    heirs: list[Any] = []
    taken: set[int] = set()
    for parent in parents.tolist():
        heirs.append(seqs[parent].fork() if parent in taken else seqs[parent])
        taken.add(parent)
    for at, seq in enumerate(seqs):
        if at not in taken:
            seq.close()
    return heirs
