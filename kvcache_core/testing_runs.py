"""What :mod:`kvcache_core.testing` runs: calls, steps, forks, truncations and generation, from a cache and without."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.decoder import CacheDecoder, RecomputeDecoder
from kvcache_core.errors import InvalidInput
from kvcache_core.frontend import FrontendCache
from kvcache_core.generation import generate_tokens
from kvcache_core.options import GenerateOptions
from kvcache_core.testing_bound import Errors, Truth, Uncached, distance, longest, padded
from kvcache_core.testing_report import HINTS, CacheReport, Record, errors_of, judge

__all__ = ["Kit"]

_Array = NDArray[Any]


@dataclass
class Kit:
    """One check of one model over one cache.

    Attributes:
        model: attached to ``cache``.
        cache: what serves it.
        seed: of the tokens, splits and lengths that are drawn.
        ids: the vocabulary that tokens are drawn from.
        max_length: tokens of a sequence at most.
        records: every cached output so far.
    """

    model: Any
    cache: FrontendCache
    seed: int
    ids: list[int]
    max_length: int
    records: list[Record] = field(default_factory=list)
    uncached: Uncached = field(init=False)
    random: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.uncached = Uncached(self.model, self.cache)
        self.random = np.random.default_rng(self.seed)

    def run(self, prompts: list[list[int]], max_new_tokens: int, rounds: int, tolerance: float | None) -> CacheReport:
        """Everything that :func:`~kvcache_core.testing.assert_cached_equals_recompute` checks.

        Raises:
            AssertionError: a result differs, or the cache was not used.
            InvalidInput: prompts that are too long, or a cache that is too small.
        """
        room = self.max_length - max_new_tokens
        if room < 8 or any(not 0 < len(prompt) <= room for prompt in prompts):
            sizes = [len(prompt) for prompt in prompts]
            raise InvalidInput(
                f"max_length must be at least max_new_tokens + 8 and leave room for every prompt; got "
                f"max_length={self.max_length}, max_new_tokens={max_new_tokens}, prompts of {sizes} tokens"
            )
        self._check_room(4 + len(prompts))
        before = self.cache.core.stats().hit_tokens
        rows = self._rows(prompts, room)
        self._plain(rows)
        self._play(rows, rounds)
        truth = self._truth(tolerance)
        reused = self.cache.stats().hit_tokens - before
        again = None if tolerance is not None else lambda number: self._renamed(number, prompts, room, rounds)
        report = judge(self.records, truth, reused, again)
        if self.cache.spec is not None and len(self.cache.spec.output_shape) == 1:
            self._greedy(rows, max_new_tokens, report.bound)
        return report

    # ---- what is run ---------------------------------------------------------------------------

    def _rows(self, prompts: list[list[int]], room: int) -> list[list[int]]:
        """The tokens that all is run with: the first two rows and the fourth share a head."""
        text = self._draw(room)
        return [text, text[: room // 2] + self._draw(room // 3), self._draw(1), text[: room // 3], *prompts]

    def _play(self, rows: list[list[int]], rounds: int) -> None:
        """Everything from the cache; nothing that was cached before is used."""
        self.cache.salt = b"kvcache_core.testing " + os.urandom(16)
        self._calls(rows)
        for at in range(rounds):
            self._steps(rows, f"round {at}")
            self._fork_and_truncate(rows[0], f"round {at}")

    def _plain(self, rows: list[list[int]]) -> None:
        """The model alone: repeatable, causal, rows independent. A break of half the digits is no rounding."""
        whole_row = max(rows, key=len)
        outputs = self.uncached(rows)
        coarse = math.sqrt(self.uncached.epsilon) * max(float(np.abs(one).max()) for one in outputs)
        again = self.uncached(rows)
        head, whole = self.uncached([whole_row[: len(whole_row) // 2]])[0], self.uncached([whole_row])[0]
        for kind, one, other in (
            *(("repeated", one, other) for one, other in zip(outputs, again, strict=True)),
            ("causal", head, whole[: len(head)]),
            *(("batch", one, self.uncached([row])[0]) for row, one in zip(rows, outputs, strict=True)),
        ):
            error = distance(one, other)
            if not error <= coarse:
                raise AssertionError(f"the model cannot be cached: outputs differ by {error:.3g}; {HINTS[kind]}")

    def _calls(self, rows: list[list[int]]) -> None:
        """``model(x)`` inside ``with cache:``."""
        half = [rows[0][: len(rows[0]) // 2]]
        self._inside("cold", "a first call with half of a row", half, 0)
        self._inside("warm", "a call whose first half was cached before", [rows[0]], len(half[0]) - 1)
        self._inside("warm", "a ragged call, partly cached", rows, 0)
        for _ in range(2):
            self._inside("warm", "the same ragged call, cached", rows, sum(len(row) - 1 for row in rows))

    def _inside(self, kind: str, place: str, rows: list[list[int]], reused: int) -> None:
        before = self.cache.stats()
        ids = padded(rows)
        ragged = {"lengths": [len(row) for row in rows]} if len({len(row) for row in rows}) > 1 else {}
        with self.cache:
            output = self.cache.to_numpy(self.model(self.cache.native_ids(ids), **ragged))
        after = self.cache.stats()
        if after.bypassed_calls != before.bypassed_calls:
            raise AssertionError(f"{place}: the call went around the cache (its KVCacheWarning says why)")
        # A window layer may have lost what a match in the last block would need.
        least = reused - len(rows) * self.cache.core.block_size
        if after.hit_tokens - before.hit_tokens < least:
            raise AssertionError(
                f"{place}: {after.hit_tokens - before.hit_tokens} tokens were reused, {reused} were cached before; the "
                "weights change from call to call, or the cache is too small"
            )
        for at, row in enumerate(rows):
            if self.cache.outputs == "last":
                self._record(kind, f"{place}, row {at}", row, output[at, 0])
            else:
                for end in range(1, len(row) + 1):
                    self._record(kind, f"{place}, row {at}, position {end - 1}", row[:end], output[at, end - 1])

    def _steps(self, rows: list[list[int]], place: str) -> None:
        """Every row as a sequence, in random ragged steps."""
        seqs = [self.cache.open(row) for row in rows]
        try:
            while left := [at for at, row in enumerate(rows) if seqs[at].length < len(row)]:
                chosen = [at for at in left if self.random.random() < 0.7] or left[:1]
                counts = {at: int(self.random.integers(1, len(rows[at]) - seqs[at].length + 1)) for at in chosen}
                if self.random.random() < 0.5:
                    counts = dict.fromkeys(chosen, 1)
                new = [rows[at][seqs[at].length : seqs[at].length + counts[at]] for at in chosen]
                output = self.cache.step([seqs[at] for at in chosen], new)
                for at, one in zip(chosen, output, strict=True):
                    self._record("steps", f"{place}, row {at}", rows[at][: seqs[at].length], one)
                # What is published is found, and the next round starts from there.
        finally:
            for seq in seqs:
                seq.close()

    def _fork_and_truncate(self, text: list[int], place: str) -> None:
        head = text[: int(self.random.integers(2, len(text) - 4))]
        head[-1] = self._draw(1)[0]
        seqs = [self.cache.open(head)]
        try:
            self._advance("steps", place, [head], seqs, [head[seqs[0].num_cached :]])
            seqs.append(seqs[0].fork())
            tokens = [list(head), list(head)]
            for _ in range(2):
                self._advance("fork", place, tokens, seqs, [self._draw(1), self._draw(2)])
            kept = len(tokens[1]) - int(self.random.integers(1, 4))
            try:
                seqs[1].truncate(kept)
            except InvalidInput:
                return  # a window layer has dropped what it would need again: refused, not wrong
            tokens[1] = tokens[1][:kept]
            self._advance("truncate", place, tokens, seqs, [self._draw(2), self._draw(1)])
        finally:
            for seq in seqs:
                seq.close()

    def _advance(self, kind: str, place: str, tokens: list[list[int]], seqs: list[Any], new: list[list[int]]) -> None:
        """One step; ``tokens`` are what the sequences hold afterwards."""
        output = self.cache.step(seqs, new)
        for at, one in enumerate(output):
            if len(tokens[at]) < seqs[at].length:
                tokens[at].extend(new[at])
            self._record(kind, f"{place}, sequence {at} of {kind}", tokens[at], one)

    def _greedy(self, rows: list[list[int]], count: int, bound: float) -> None:
        options = GenerateOptions(count)
        expected = generate_tokens(RecomputeDecoder(self.uncached.logits), rows, options)
        self.cache.refresh()
        for place in ("cold", "warm"):
            found = generate_tokens(CacheDecoder(self.cache), rows, options)
            for at, (own, plain) in enumerate(zip(found, expected, strict=True)):
                if own == plain:
                    continue
                step = next(step for step, (a, b) in enumerate(zip(own, plain, strict=True)) if a != b)
                logits = self.uncached.logits([rows[at] + plain[:step]])[0]
                gap = abs(float(logits[plain[step]] - logits[own[step]]))
                if not gap <= 2 * bound:
                    raise AssertionError(
                        f"greedy generation ({place}), row {at}, new token {step}: {own[step]} with the cache, "
                        f"{plain[step]} without, and their logits are {gap:.3g} apart; {HINTS['greedy']}"
                    )

    # ---- comparing -----------------------------------------------------------------------------

    def _truth(self, tolerance: float | None) -> Truth:
        runs = longest({record.tokens for record in self.records})
        return Truth(self.uncached, runs, tolerance, self.random)

    def _renamed(self, number: int, prompts: list[list[int]], room: int, rounds: int) -> Errors:
        """The same work with the tokens renamed: the same shapes and shared heads, another rounding."""
        names = np.random.default_rng((self.seed, number)).permutation(self.ids).tolist()
        rename = dict(zip(self.ids, names, strict=True))
        kit = Kit(self.model, self.cache, self.seed, names, self.max_length)
        kit._play(kit._rows([[rename.get(token, token) for token in prompt] for prompt in prompts], room), rounds)
        truth = kit._truth(None)
        return truth.errors(float(np.max(errors_of(kit.records, truth))))

    def _record(self, kind: str, place: str, tokens: list[int], output: Any) -> None:
        self.records.append(Record(kind, place, tuple(tokens), np.asarray(output, np.float64)))

    def _draw(self, count: int) -> list[int]:
        return [self.ids[at] for at in self.random.integers(0, len(self.ids), count)]

    def _check_room(self, rows: int) -> None:
        core = self.cache.core
        needed = (rows + 2) * (-(-self.max_length // core.block_size) + 1)
        if core.num_blocks < needed:
            raise InvalidInput(
                f"the check needs {needed} blocks for {rows} rows of up to {self.max_length} tokens, the cache has "
                f"{core.num_blocks}; make it larger or max_length= smaller"
            )
