"""For users' own test suites: is a model, served from a cache, still the same model?"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.decoder import CacheDecoder, RecomputeDecoder
from kvcache_core.errors import InvalidInput
from kvcache_core.frontend import FrontendCache
from kvcache_core.generation import generate_tokens
from kvcache_core.options import GenerateOptions
from kvcache_core.tier_contract import check_tier

__all__ = ["CacheReport", "assert_cached_equals_recompute", "check_tier"]

_Array = NDArray[Any]
_EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}

_HINTS = {
    "repeated": "two equal calls outside the cache differ: the model keeps state between calls or is random "
    "(call model.eval() before)",
    "causal": "outside the cache, an output depends on later tokens: something besides attention mixes tokens "
    "(a mean or a convolution over T, a normalisation over the sequence)",
    "batch": "outside the cache, a row's output depends on the other rows: batch statistics, or state kept per batch",
    "cold": "nothing was reused yet: attention() is called with other arguments inside `with cache:` than outside, "
    "or the model's rows are not independent",
    "warm": "reused tokens change the result: the model does not take its positions from positions(), mixes tokens "
    "outside attention(), or gives a layer another layer= number from call to call",
    "steps": "tokens computed in parts change the result: the model does not take its positions from positions(), "
    "mixes tokens outside attention(), or gives a layer another layer= number from call to call",
    "fork": "two continuations of one past disturb each other: the model keeps state of its own besides the cache",
    "truncate": "forgotten tokens still act: the model keeps state of its own besides the cache",
    "greedy": "generation goes another way: compare the steps above; if only this fails, the model keeps state "
    "between calls",
}


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What :func:`assert_cached_equals_recompute` has seen.

    Attributes:
        compared: outputs compared, per kind of check.
        error: the largest error of a cached output.
        bound: what was allowed.
        uncached_error: the largest error of the model without the cache (or, without a float64 reference,
            how far its outputs move when the same rows are computed in another batch).
        reference: ``"float64"``, ``"uncached"`` or ``"tolerance"``: what the errors were measured against.
        reused_tokens: tokens that were not computed again.
    """

    compared: dict[str, int]
    error: float
    bound: float
    uncached_error: float
    reference: str
    reused_tokens: int


def assert_cached_equals_recompute(
    model: Any,
    cache: FrontendCache,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    vocab_size: int | None = None,
    max_length: int = 32,
    max_new_tokens: int = 8,
    rounds: int = 4,
    seed: int = 0,
    tolerance: float | None = None,
) -> CacheReport:
    """Check that ``model`` gives the same results from ``cache`` as without it.

    Compares calls inside ``with cache:`` (nothing cached, all cached, a shared prefix cached, ragged rows), random
    splits into steps over ragged batches, forks, truncations and greedy generation.

    The bound, when no ``tolerance`` is given. ulp is the distance of neighbouring numbers at the largest output, in
    the coarser one of the output's and the K/V dtype (float32: 1.2e-7 to 6e-8 of it; bfloat16: 0.8 % to 0.4 %).

    - Where the adapter can run the model in float64 (PyTorch): the error against float64 is at most 1.5 times
      that of the uncached runs, plus 1 ulp. Uncached runs are those of the same rows,
      whole and in parts, alone and together; the largest error counts. Where a cached output passes the bound by
      less than 16 times, its place is run uncached in 16 more shapes first: one run's rounding can be small by luck.
    - Else (Keras; a model that is float64 itself): the difference from the uncached output is at most 2.5 times as
      far as uncached outputs move when the same rows are computed alone, together, and as parts (of which at most
      256 ulp count), plus 32 ulp. 2.5 = 1 + 1.5: the error of the uncached run and the one allowed to the cached run.

    A wrong position, layer or mask is off by thousands of ulp in float32 and float64. In bfloat16 a small fault can
    hide in the rounding: check such a model in float32 too.

    Generated tokens must be equal, except where the uncached logits of the two tokens are closer than twice the
    bound: there either choice is right.

    Args:
        model: attached to ``cache``, or to no cache: then it is attached for the time of the check.
        cache: either adapter's ``KVCache``. The check uses a salt of its own: what is cached is not used, but may be
            evicted.
        prompts: token ids to use besides random ones.
        vocab_size: random ids are below it; default is what the cache has found out.
        max_length: tokens of a sequence at most, generated ones included.
        max_new_tokens: tokens to generate.
        rounds: random scripts of steps, forks and truncations.
        seed: of the random choices.
        tolerance: allowed largest absolute difference from the uncached output, instead of the bound above.

    Raises:
        AssertionError: a result differs, or the cache was not used. Says where, by how much, and what it may mean.
        InvalidInput: a lossy cache (``cache.exact`` is False) without a tolerance, a cache too small for the check,
            or no vocabulary to draw ids from.
    """
    attached_here = cache.model is None
    if attached_here:
        cache.attach(model)
    salt = cache.salt
    cache.salt = b"kvcache_core.testing " + os.urandom(16)
    try:
        core = cache.core
        if not cache.exact and tolerance is None:
            raise InvalidInput(
                "the cache stores another dtype than the model's and is not exact: give tolerance=, the largest "
                "difference you accept"
            )
        live = core.stats().live_blocks
        kit = _Kit(model, cache, np.random.default_rng(seed), _ids(cache, prompts, vocab_size), max_length)
        report = kit.run([list(prompt) for prompt in prompts or ()], max_new_tokens, rounds, tolerance)
        core.check_valid()
        if core.stats().live_blocks != live:
            raise AssertionError(f"{core.stats().live_blocks - live} blocks are still live after all sequences closed")
        return report
    finally:
        cache.salt = salt
        if attached_here:
            cache.detach()


def _ids(cache: FrontendCache, prompts: Sequence[Sequence[int]] | None, vocab_size: int | None) -> list[int]:
    """The ids that random prompts are drawn from."""
    known = vocab_size or (cache.spec.vocab_size if cache.spec else None)
    if known:
        return list(range(known))
    if prompts:
        return sorted({int(token) for prompt in prompts for token in prompt})
    raise InvalidInput("the vocabulary size is not known: give vocab_size= or prompts=")


@dataclass(frozen=True, slots=True)
class _Record:
    """One output [..., V] behind ``tokens``, and where it was seen."""

    kind: str
    place: str
    tokens: tuple[int, ...]
    output: _Array


@dataclass
class _Kit:
    model: Any
    cache: FrontendCache
    random: np.random.Generator
    ids: list[int]
    max_length: int
    records: list[_Record] = field(default_factory=list)

    def run(self, prompts: list[list[int]], max_new_tokens: int, rounds: int, tolerance: float | None) -> CacheReport:
        room = self.max_length - max_new_tokens
        if room < 8 or any(not 0 < len(prompt) <= room for prompt in prompts):
            sizes = [len(prompt) for prompt in prompts]
            raise InvalidInput(
                f"max_length must be at least max_new_tokens + 8 and leave room for every prompt; got "
                f"max_length={self.max_length}, max_new_tokens={max_new_tokens}, prompts of {sizes} tokens"
            )
        text = self._draw(room)
        rows = [text, text[: room // 2] + self._draw(room // 3), self._draw(1), text[: room // 3], *prompts]
        self._check_room(len(rows))
        before = self.cache.core.stats().hit_tokens
        self._plain(rows)
        self._calls(rows)
        for at in range(rounds):
            self._steps(rows, f"round {at}")
            self._fork_and_truncate(text, f"round {at}")
        bound, report = self._compare(tolerance, before)
        if self.cache.spec is not None and len(self.cache.spec.output_shape) == 1:
            self._greedy(rows, max_new_tokens, bound)
        return report

    # ---- what is run ---------------------------------------------------------------------------

    def _plain(self, rows: list[list[int]]) -> None:
        """The model alone: repeatable, causal, rows independent. A break of half the digits is no rounding."""
        longest = max(rows, key=len)
        outputs = self.outside(rows)
        coarse = math.sqrt(self.epsilon) * max(float(np.abs(one).max()) for one in outputs)
        again = self.outside(rows)
        head, whole = self.outside([longest[: len(longest) // 2]])[0], self.outside([longest])[0]
        for kind, one, other in (
            *(("repeated", one, other) for one, other in zip(outputs, again, strict=True)),
            ("causal", head, whole[: len(head)]),
            *(("batch", one, self.outside([row])[0]) for row, one in zip(rows, outputs, strict=True)),
        ):
            error = _distance(one, other)
            if not error <= coarse:
                raise AssertionError(f"the model cannot be cached: outputs differ by {error:.3g}; {_HINTS[kind]}")

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
        padded = _padded(rows)
        ragged = {"lengths": [len(row) for row in rows]} if len({len(row) for row in rows}) > 1 else {}
        with self.cache:
            output = self.cache.to_numpy(self.model(self.cache.native_ids(padded), **ragged))
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
        expected = generate_tokens(RecomputeDecoder(self._logits), rows, options)
        self.cache.refresh()
        for place in ("cold", "warm"):
            found = generate_tokens(CacheDecoder(self.cache), rows, options)
            for at, (own, plain) in enumerate(zip(found, expected, strict=True)):
                if own == plain:
                    continue
                step = next(step for step, (a, b) in enumerate(zip(own, plain, strict=True)) if a != b)
                logits = self._logits([rows[at] + plain[:step]])[0]
                gap = abs(float(logits[plain[step]] - logits[own[step]]))
                if not gap <= 2 * bound:
                    raise AssertionError(
                        f"greedy generation ({place}), row {at}, new token {step}: {own[step]} with the cache, "
                        f"{plain[step]} without, and their logits are {gap:.3g} apart; {_HINTS['greedy']}"
                    )

    # ---- comparing -----------------------------------------------------------------------------

    def _compare(self, tolerance: float | None, hits_before: int) -> tuple[float, CacheReport]:
        """Every output against full computation; returns the bound too, for comparing generated tokens."""
        truth = _Truth(self, _longest({record.tokens for record in self.records}), tolerance)
        errors = [_distance(record.output, truth.outputs[record.tokens]) for record in self.records]
        order = sorted(range(len(errors)), key=lambda at: -errors[at] if errors[at] == errors[at] else -math.inf)
        worst = self.records[order[0]]
        for at in order[:3]:
            # One run's own error is one draw of its rounding, and can be small by luck at just this place.
            if tolerance is None and truth.bound < errors[at] < 16 * truth.bound:
                truth.draw_again(self.records[at].tokens)
        failed = [at for at in order if not errors[at] <= truth.bound]
        if failed:
            # The simplest kind of check that fails says most about the cause.
            at = min(failed, key=lambda at: list(_HINTS).index(self.records[at].kind))
            record = self.records[at]
            raise AssertionError(
                f"{record.place}: the output behind {len(record.tokens)} tokens is off by {errors[at]:.3g}, allowed "
                f"are {truth.bound:.3g} (measured against: {truth.reference}; uncached runs: {truth.own:.3g}); the "
                f"largest error of all is {errors[order[0]]:.3g} in {worst.place}. Probably {_HINTS[record.kind]}"
            )
        compared = Counter(record.kind for record in self.records)
        reused = self.cache.stats().hit_tokens - hits_before
        error = errors[order[0]]
        return truth.bound, CacheReport(dict(compared), error, truth.bound, truth.own, truth.reference, reused)

    @property
    def epsilon(self) -> float:
        spec = self.cache.spec
        return max(_EPSILON[spec.dtype], _EPSILON[spec.output_dtype]) if spec else _EPSILON["float32"]

    def outside(self, rows: list[list[int]]) -> list[_Array]:
        """The model without the cache: per row [T, ...]."""
        return _cut(self.cache.to_numpy(self.model(self.cache.native_ids(_padded(rows)))), rows)

    def _logits(self, rows: list[list[int]]) -> _Array:
        return np.stack([one[-1] for one in self.outside(rows)])

    def _record(self, kind: str, place: str, tokens: list[int], output: Any) -> None:
        self.records.append(_Record(kind, place, tuple(tokens), np.asarray(output, np.float64)))

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


class _Truth:
    """The right outputs, how wrong the model itself is without a cache, and the bound that follows.

    Args:
        kit: runs the model.
        runs: token rows to compute; every head of one has its output in :attr:`outputs`.
        tolerance: the bound, if the caller gave one.
    """

    def __init__(self, kit: _Kit, runs: list[tuple[int, ...]], tolerance: float | None) -> None:
        self._kit, self._tolerance = kit, tolerance
        plain = [kit.outside([list(run)])[0] for run in runs]
        magnitude = max(float(np.abs(one).max()) for one in plain)
        self._ulp = 2.0 ** math.floor(math.log2(max(magnitude, 1e-30))) * kit.epsilon
        # A float64 model has nothing wider to be measured against.
        narrow = tolerance is None and kit.epsilon > _EPSILON["float64"]
        self._wide = kit.cache.float64_model() if narrow else None
        if self._wide is None:
            self.reference = "uncached" if tolerance is None else "tolerance"
        else:
            self.reference = "float64"
        exact = plain if self._wide is None else [self._exact([list(run)])[0] for run in runs]
        self.outputs = {
            run[:end]: one[end - 1] for run, one in zip(runs, exact, strict=True) for end in range(1, len(run) + 1)
        }
        self.own = max(_distance(one, true) for one, true in zip(plain, exact, strict=True))
        self._draw([list(run) for run in runs])
        for run in runs:
            self._draw([list(run[: 1 + int(kit.random.integers(len(run)))])])

    @property
    def bound(self) -> float:
        """The largest error allowed."""
        if self._tolerance is not None:
            return self._tolerance
        if self._wide is not None:
            return 1.5 * self.own + self._ulp
        return 2.5 * min(self.own, 256 * self._ulp) + 32 * self._ulp

    def draw_again(self, tokens: tuple[int, ...]) -> None:
        """More uncached runs of one place, in batches of other shapes."""
        for rows in range(1, 5):
            for more in range(4):
                longer = list(tokens if self._wide is None else (*tokens, *tokens[:more]))
                self._draw([longer] * rows)

    def _draw(self, rows: list[list[int]]) -> None:
        # Like with like: the same rows on both sides, so that a model that mixes rows or tokens gains nothing.
        if self._wide is not None:
            exact = self._exact(rows)
        else:
            exact = [np.stack([self.outputs[tuple(row[:end])] for end in range(1, len(row) + 1)]) for row in rows]
        for one, true in zip(self._kit.outside(rows), exact, strict=True):
            self.own = max(self.own, _distance(one, true))

    def _exact(self, rows: list[list[int]]) -> list[_Array]:
        run = self._wide
        return [] if run is None else _cut(run(_padded(rows)), rows)


def _padded(rows: Sequence[Sequence[int]]) -> _Array:
    """[B, T] ids, padded on the right with each row's last token."""
    width = max(map(len, rows))
    return np.array([[*row, *[row[-1]] * (width - len(row))] for row in rows], np.int64)


def _cut(output: _Array, rows: Sequence[Sequence[int]]) -> list[_Array]:
    return [one[: len(row)] for one, row in zip(output, rows, strict=True)]


def _distance(one: _Array, other: _Array) -> float:
    if one.shape != other.shape:
        raise AssertionError(f"an output has shape {one.shape} with the cache and {other.shape} without")
    return float(np.abs(one - other).max())


def _longest(runs: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The runs that are not the head of another one."""
    ordered = sorted(runs)
    return [run for run, after in zip(ordered, [*ordered[1:], ()], strict=True) if after[: len(run)] != run]
