"""What :mod:`kvcache_core.testing` has seen: outputs from a cache, and whether they are right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.testing_bound import Errors, Truth, distance, over_draws

__all__ = ["HINTS", "CacheReport", "Record", "errors_of", "judge"]

HINTS = {
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
        error: the largest error of a cached output; the mean of those of all draws.
        bound: what was allowed.
        uncached_error: the largest error of the model without the cache (or, without a float64 reference,
            how far its outputs move when the same rows are computed in another batch).
        reference: ``"float64"``, ``"uncached"`` or ``"tolerance"``: what the errors were measured against.
        reused_tokens: tokens that were not computed again.
        draws: 1, or how often all was run because the bound was passed at first.
    """

    compared: dict[str, int]
    error: float
    bound: float
    uncached_error: float
    reference: str
    reused_tokens: int
    draws: int = 1


@dataclass(frozen=True, slots=True)
class Record:
    """One output [..., V] behind ``tokens``, and where it was seen."""

    kind: str
    place: str
    tokens: tuple[int, ...]
    output: NDArray[Any]


def errors_of(records: Sequence[Record], truth: Truth) -> list[float]:
    """Every output's distance from full computation."""
    return [distance(record.output, truth.outputs[record.tokens]) for record in records]


def judge(
    records: Sequence[Record],
    truth: Truth,
    reused_tokens: int,
    again: Callable[[int], Errors] | None,
) -> CacheReport:
    """Compare every output with full computation.

    Args:
        records: the outputs.
        truth: what they should be.
        reused_tokens: for the report.
        again: runs all once more with another rounding; None where one run decides.

    Raises:
        AssertionError: an output is further off than the bound allows.
    """
    errors = errors_of(records, truth)
    first = truth.errors(float(np.max(errors)))  # of numbers with a NaN: NaN
    # No rounding passes the bound 16 times.
    may_be_chance = again is not None and first.cached < 16 * first.bound
    judged, draws = over_draws(first, again) if again is not None and may_be_chance else (first, 1)
    if not judged.holds:
        over = f" (means of {draws} runs: {judged.cached:.3g}, allowed {judged.bound:.3g})" if draws > 1 else ""
        raise AssertionError(_failure(records, errors, first, truth.reference, over))
    compared = dict(Counter(record.kind for record in records))
    return CacheReport(compared, judged.cached, judged.bound, judged.uncached, truth.reference, reused_tokens, draws)


def _failure(records: Sequence[Record], errors: list[float], first: Errors, reference: str, over: str) -> str:
    """Where, by how much, and what it may mean."""
    # The simplest kind of check that fails says most about the cause.
    failed = [at for at, error in enumerate(errors) if not error <= first.bound]
    at = min(failed, key=lambda at: list(HINTS).index(records[at].kind))
    worst = records[int(np.argmax(errors))]
    return (
        f"{records[at].place}: the output behind {len(records[at].tokens)} tokens is off by {errors[at]:.3g}, allowed "
        f"are {first.bound:.3g} (measured against: {reference}; uncached runs: {first.uncached:.3g}); the largest "
        f"error of all is {first.cached:.3g} in {worst.place}{over}. Probably {HINTS[records[at].kind]}"
    )
