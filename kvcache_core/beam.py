"""Beam search over forked sequences: a beam never copies its past, and the prompt is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.cache import token_array
from kvcache_core.decoder import Decoder
from kvcache_core.options import GenerateOptions

__all__ = ["beam_search"]


@dataclass(slots=True)
class _Beam:
    seq: Any
    new: list[int]
    score: float


@dataclass(slots=True)
class _Search:
    """The beams of one prompt, and its finished hypotheses as (score, tokens), best first."""

    beams: list[_Beam]
    finished: list[tuple[float, list[int]]] = field(default_factory=list)

    def close(self) -> None:
        """Close the sequences of all beams."""
        for beam in self.beams:
            beam.seq.close()
        self.beams = []


def beam_search(decoder: Decoder, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> list[list[int]]:
    """The ``options.n`` best continuations of each prompt, best first, prompt by prompt.

    A step keeps the ``num_beams`` best running beams of 2 x ``num_beams`` candidates; an end-of-sequence
    candidate among the first ``num_beams`` becomes a finished hypothesis. A prompt is done when no running
    beam can still beat its worst finished one. The same rules as Hugging Face transformers' beam search.

    Raises:
        InvalidInput, CacheFull: as :func:`~kvcache_core.generation.generate_tokens`.
    """
    limits = options.limits(len(prompts))
    checked = [list(token_array(prompt, f"prompt {at}")) for at, prompt in enumerate(prompts)]
    for tokens, limit in zip(checked, limits, strict=True):
        decoder.check_fits(len(tokens), limit, 2 * options.num_beams)
    found: list[list[int]] = []
    for tokens, limit in zip(checked, limits, strict=True):
        search = _Search([_Beam(decoder.open(tokens, limit), [], 0.0)])
        try:
            _run(decoder, tokens, search, options, limit)
        finally:
            search.close()
        found += [new for _, new in search.finished[: options.n]]
    return found


def _run(decoder: Decoder, tokens: list[int], search: _Search, options: GenerateOptions, limit: int) -> None:
    seq = search.beams[0].seq
    chunk = options.prefill_chunk if decoder.cached else None
    while chunk is not None and len(tokens) - seq.length > chunk:
        decoder.step_greedy([seq], [tokens[seq.length : seq.length + chunk]])
    pending = [tokens[seq.length :]]
    for length in range(1, limit + 1):
        found = decoder.step_top([beam.seq for beam in search.beams], pending, 2 * options.num_beams)
        candidates = _candidates(search.beams, *found, 2 * options.num_beams)
        last = length == limit
        _advance(search, candidates, length, options, last)
        if last or not search.beams or _done(search, length, options):
            return
        pending = [[beam.new[-1]] for beam in search.beams]


def _candidates(
    beams: Sequence[_Beam], scores: NDArray[np.float64], tokens: NDArray[np.int64], count: int
) -> list[tuple[float, int, int]]:
    """The ``count`` best continuations as (score, beam, token), best first.

    Args:
        beams: the running beams, B of them.
        scores: [B, K] log-probabilities of each beam's best next tokens; K is at least ``count`` or all there are.
        tokens: [B, K].
        count: how many.
    """
    flat = (scores + np.array([[beam.score] for beam in beams])).ravel()
    best = np.argsort(-flat, kind="stable")[:count]
    return [(float(flat[at]), int(at) // scores.shape[1], int(tokens.ravel()[at])) for at in best]


def _advance(
    search: _Search,
    candidates: Sequence[tuple[float, int, int]],
    length: int,
    options: GenerateOptions,
    last: bool,
) -> None:
    """Sort the candidates into finished hypotheses and the next running beams."""
    chosen: list[tuple[float, int, int]] = []
    for rank, (score, beam, token) in enumerate(candidates):
        if token in options.eos_ids or last:
            if rank < options.num_beams:
                search.finished.append((score / length**options.length_penalty, [*search.beams[beam].new, token]))
        elif len(chosen) < options.num_beams:
            chosen.append((score, beam, token))
    search.finished.sort(key=lambda hypothesis: -hypothesis[0])
    del search.finished[options.num_beams :]
    search.beams = _fork_beams(search.beams, chosen)


def _fork_beams(beams: Sequence[_Beam], chosen: Sequence[tuple[float, int, int]]) -> list[_Beam]:
    """Continue each chosen beam: its first heir takes the sequence over, the others fork it."""
    heirs: list[_Beam] = []
    taken: set[int] = set()
    for score, at, token in chosen:
        parent = beams[at]
        seq = parent.seq.fork() if at in taken else parent.seq
        taken.add(at)
        heirs.append(_Beam(seq, [*parent.new, token], score))
    for at, beam in enumerate(beams):
        if at not in taken:
            beam.seq.close()
    return heirs


def _done(search: _Search, length: int, options: GenerateOptions) -> bool:
    if len(search.finished) < options.num_beams:
        return False
    attainable: float = search.beams[0].score / length**options.length_penalty
    return search.finished[-1][0] >= attainable
