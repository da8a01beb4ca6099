"""Generating tokens: greedy, sampled, several continuations and streaming, over any framework's step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvcache_core.cache import token_array
from kvcache_core.decoder import Decoder
from kvcache_core.errors import InvalidInput
from kvcache_core.sampling import Sampling, pick

__all__ = ["GenerateOptions", "generate_tokens", "stream_tokens"]


_WORTH_A_WAVE = 32
"""Tokens of shared prefix for which a prompt waits: a further wave reads all weights once more, which costs
about as much as computing some tens of tokens."""
_STEPS_AT_ONCE = 32
"""Greedy tokens that the decoder is asked for at once."""


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
                _advance(decoder, running, options)
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


def _advance(decoder: Decoder, running: Sequence[_Row], options: GenerateOptions) -> None:
    """At least one further token for every row. Several when greedy: nobody can join before a row ends."""
    seqs, last = [row.seq for row in running], [[row.new[-1]] for row in running]
    if options.sampling.temperature:
        for row, scores in zip(running, decoder.step(seqs, last), strict=True):
            row.new.append(pick(scores, options.sampling, row.random))
        return
    count = min(_STEPS_AT_ONCE, *(options.max_new_tokens - len(row.new) for row in running))
    for row, chosen in zip(running, decoder.decode_greedy(seqs, last, count, options.eos_ids), strict=True):
        row.new += chosen.tolist()


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
            if options.sampling.temperature:
                token = pick(decoder.step([seq], [new])[0], options.sampling, random)
            else:
                token = int(decoder.step_greedy([seq], [new])[0])
            yield token
            if token in options.eos_ids:
                return
            new = [token]
    finally:
        seq.close()
