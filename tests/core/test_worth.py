"""When a module's cache is left out."""

from __future__ import annotations

import pytest

from kvcache_core import InvalidInput
from kvcache_core.worth import Worth, check_bypass


def run(worth, calls, *, computing, spent, rows=4):
    """So many calls through the cache; returns how many went without it."""
    without = 0
    for _ in range(calls):
        if worth.skip:
            worth.skip -= 1
            without += 1
        else:
            worth.called(rows, computing, spent)
    return without


def test_seconds():
    worth = Worth(auto=False)
    worth.measured(4, 100.0)  # a first run loads and allocates: forgotten
    worth.measured(4, 4.0)
    worth.called(4, computing=4.0, spent=0.5)
    worth.called(4, computing=1.0, spent=0.5)
    assert (worth.saved, worth.spent) == (3.0, 1.0)
    assert run(worth, 1000, computing=4.0, spent=9.0) == 0, "without auto it is only counted"


def test_the_look_at_the_weights_counts_among_what_the_cache_costs():
    decided = []
    for look in (0.0, 1.0):
        worth = Worth(auto=True)
        worth.measured(4, 1.0)
        for _ in range(32):
            worth.looked(look)
            worth.called(4, computing=0.5, spent=0.1)
        decided.append(worth.skip > 0)
        assert worth.spent == pytest.approx(32 * (0.1 + look))
    assert decided == [False, True]


def test_what_does_not_pay_is_left_out_and_looked_at_ever_less_often():
    worth = Worth(auto=True)
    worth.measured(4, 1.0)
    without = run(worth, 100_000, computing=1.0, spent=0.1)
    assert without > 99_900
    assert run(worth, 100, computing=1.0, spent=0.1) == 100


def test_what_pays_is_used():
    worth = Worth(auto=True)
    worth.measured(4, 1.0)
    assert run(worth, 10_000, computing=0.1, spent=0.2) == 0
    run(worth, 50, computing=1.0, spent=0.5)
    assert worth.skip, "until it no longer does"
    worth.skip = 0
    assert run(worth, 1000, computing=0.1, spent=0.2) == 0, "and again"


def test_bypass_is_never_or_auto():
    assert check_bypass("auto") == "auto"
    with pytest.raises(InvalidInput, match="bypass must be one of"):
        check_bypass("always")
