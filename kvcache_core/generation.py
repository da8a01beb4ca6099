"""Generating tokens: greedy, sampled, several continuations and streaming, over any framework's step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvcache_core.cache import token_array
from kvcache_core.errors import InvalidInput
from kvcache_core.sampling import Sampling, pick

__all__ = ["Decoder", "GenerateOptions", "RecomputeDecoder", "RunningSequence", "generate_tokens", "stream_tokens"]


_WORTH_A_WAVE = 32
"""Tokens of shared prefix for which a prompt waits: a further wave reads all weights once more, which costs
about as much as computing some tens of tokens."""


class RunningSequence(Protocol):
    """What generation needs of a sequence."""

    num_cached: int

    def fork(self) -> Any:
        """A second sequence with the same past."""

    def close(self) -> None:
        """Give its room back."""


class Decoder(Protocol):
    """What generation needs of a model: each adapter makes one from its cache."""

    def open(self, tokens: Sequence[int], max_new_tokens: int) -> Any:
        """A sequence that has ``num_cached`` of ``tokens`` already."""

    def step(self, seqs: Sequence[Any], tokens: Sequence[Sequence[int]]) -> NDArray[Any]:
        """Append tokens to each row; returns the logits [B, V] behind each row's last token."""

    def fits(self, running: Sequence[tuple[int, int]]) -> bool:
        """Whether rows of (prompt tokens, new tokens) can run together."""

    def check_fits(self, prompt: int, new: int, copies: int) -> None:
        """Raise CacheFull if a prompt with ``copies`` continuations cannot run even alone."""

    def cached_length(self, tokens: Sequence[int]) -> int:
        """How many leading tokens are in the cache now."""


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """What to generate.

    Args:
        max_new_tokens: tokens per continuation, at most.
        eos_id: stop behind this token (it is kept); several may be given.
        sampling: how a token is chosen.
        n: continuations per prompt; the prompt is computed once.
        num_beams: 1, or the number of beams of a beam search.
        length_penalty: a finished beam's score is its log-probability / length ** length_penalty.
    """

    max_new_tokens: int
    eos_id: int | Sequence[int] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "n", "num_beams"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise InvalidInput(f"{name} must be a whole number, at least 1; got {value!r}")
        if self.num_beams > 1 and self.sampling.temperature:
            raise InvalidInput("beam search takes no temperature: set temperature=0 or num_beams=1")
        if self.n > 1 and 1 < self.num_beams < self.n:
            raise InvalidInput(f"n={self.n} continuations need at least as many beams, got {self.num_beams}")

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a row."""
        if self.eos_id is None:
            return frozenset()
        return frozenset([self.eos_id] if isinstance(self.eos_id, (int, np.integer)) else self.eos_id)


@dataclass(slots=True)
class _Row:
    """One continuation that is running."""

    prompt: int
    seq: Any
    random: np.random.Generator
    new: list[int]


def generate_tokens(decoder: Decoder, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> list[list[int]]:
    """Continue each prompt; returns the new tokens, ``options.n`` lists per prompt, prompt by prompt.

    Rows are ragged, never padded with tokens. Prompts that share a prefix are computed in waves, so that
    the shared part is computed once. Rows that end make room for prompts that wait.

    Raises:
        InvalidInput: an empty prompt or a token that is no integer.
        CacheFull: a prompt that cannot run even alone; raised before anything is computed.
    """
    checked = [list(token_array(prompt, f"prompt {at}")) for at, prompt in enumerate(prompts)]
    for prompt in checked:
        decoder.check_fits(len(prompt), options.max_new_tokens, options.n)
    results: list[list[list[int]]] = [[] for _ in checked]
    waiting = deque(range(len(checked)))
    running: list[_Row] = []
    try:
        while waiting or running:
            while wave := _next_wave(decoder, checked, waiting, running, options):
                running += _prefill(decoder, checked, wave, options, results)
            running = [row for row in running if not _finished(row, options)]
            if running:
                logits = decoder.step([row.seq for row in running], [[row.new[-1]] for row in running])
                for row, scores in zip(running, logits, strict=True):
                    row.new.append(pick(scores, options.sampling, row.random))
    finally:
        for row in running:
            row.seq.close()
    return [tokens for per_prompt in results for tokens in per_prompt]


def _next_wave(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    waiting: deque[int],
    running: Sequence[_Row],
    options: GenerateOptions,
) -> list[int]:
    """Prompts to compute now: what fits, without those that another one of the wave computes a prefix for."""
    wave: list[int] = []
    deferred: list[int] = []
    room = [(len(prompts[row.prompt]), options.max_new_tokens) for row in running]
    while waiting:
        at = waiting[0]
        room += [(len(prompts[at]), options.max_new_tokens)] * options.n
        if (running or wave) and not decoder.fits(room):
            break
        waiting.popleft()
        shared = max((_common(prompts[at], prompts[other]) for other in wave), default=0)
        gain = min(shared, len(prompts[at]) - 1) - decoder.cached_length(prompts[at])
        if gain >= _WORTH_A_WAVE:
            deferred.append(at)
            del room[-options.n :]
        else:
            wave.append(at)
    waiting.extendleft(reversed(deferred))
    return wave


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common head."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(np.asarray(one[:length]) != np.asarray(other[:length]))
    return int(differing[0]) if len(differing) else length


def _prefill(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    wave: Sequence[int],
    options: GenerateOptions,
    results: list[list[list[int]]],
) -> list[_Row]:
    """Compute the prompts of one wave and choose each continuation's first token."""
    seqs: list[Any] = []
    try:
        seqs.extend(decoder.open(prompts[at], options.max_new_tokens) for at in wave)
        tokens = [prompts[at][seq.num_cached :] for at, seq in zip(wave, seqs, strict=True)]
        logits = decoder.step(seqs, tokens)
        rows: list[_Row] = []
        for at, seq, scores in zip(wave, list(seqs), logits, strict=True):
            forks = [seq.fork() for _ in range(options.n - 1)]
            seqs += forks
            for sample, own in enumerate([seq, *forks]):
                random = options.sampling.generator(at * options.n + sample)
                rows.append(_Row(at, own, random, [pick(scores, options.sampling, random)]))
    except BaseException:
        for seq in seqs:
            seq.close()
        raise
    for row in rows:
        results[row.prompt].append(row.new)
    return rows


def _finished(row: _Row, options: GenerateOptions) -> bool:
    if row.new[-1] in options.eos_ids or len(row.new) >= options.max_new_tokens:
        row.seq.close()
        return True
    return False


def stream_tokens(decoder: Decoder, prompt: Sequence[int], options: GenerateOptions) -> Iterator[int]:
    """Yield one continuation token by token. Closing the iterator closes its sequence.

    Raises:
        InvalidInput, CacheFull: as :func:`generate_tokens`, at the first token.
    """
    if options.n != 1 or options.num_beams != 1:
        raise InvalidInput("streaming gives one continuation: n and num_beams must be 1")
    tokens = list(token_array(prompt, "the prompt"))
    decoder.check_fits(len(tokens), options.max_new_tokens, 1)
    random = options.sampling.generator(0)
    seq = decoder.open(tokens, options.max_new_tokens)
    try:
        new = tokens[seq.num_cached :]
        for _ in range(options.max_new_tokens):
            token = pick(decoder.step([seq], [new])[0], options.sampling, random)
            yield token
            if token in options.eos_ids:
                return
            new = [token]
    finally:
        seq.close()


class RecomputeDecoder:
    """The decoder without a cache: every step runs the model over all tokens so far.

    Args:
        forward: ragged rows of token ids -> logits [B, V] behind each row's last token.
    """

    def __init__(self, forward: Callable[[list[list[int]]], NDArray[Any]]) -> None:
        self._forward = forward

    def open(self, tokens: Sequence[int], max_new_tokens: int) -> _PlainSequence:
        """A sequence that starts empty."""
        return _PlainSequence([])

    def step(self, seqs: Sequence[_PlainSequence], tokens: Sequence[Sequence[int]]) -> NDArray[Any]:
        """Append tokens to each row and recompute every row."""
        for seq, new in zip(seqs, tokens, strict=True):
            seq.tokens += new
        return self._forward([seq.tokens for seq in seqs])

    def fits(self, running: Sequence[tuple[int, int]]) -> bool:
        """Always: nothing is kept."""
        return True

    def check_fits(self, prompt: int, new: int, copies: int) -> None:
        """Nothing to check: nothing is kept."""

    def cached_length(self, tokens: Sequence[int]) -> int:
        """As if all were there: no prompt waits for another one's prefix."""
        return len(tokens)


class _PlainSequence:
    """A list of tokens that can be forked and closed like a sequence."""

    num_cached = 0

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def fork(self) -> _PlainSequence:
        return _PlainSequence(list(self.tokens))

    def close(self) -> None:
        self.tokens = []
