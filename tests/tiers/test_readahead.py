"""Reading ahead: prompts that wait are read from slow tiers while others are computed, and nothing else changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest

import kvcache_keras
import kvcache_torch
from kvcache_core.decoder import CacheDecoder
from kvcache_core.generation import generate_tokens
from kvcache_core.options import GenerateOptions
from kvcache_core.readahead import Ahead
from kvcache_core.scoring import score_pairs
from kvcache_core.tiercosts import Costs, TierStats
from kvcache_core.tiers import RamTier
from tests.numpy_cache import NumpyCache, decoders
from tests.reference_decoder import DecoderConfig, InjectedFault, make_weights
from tests.tiers.backends import tiered
from tests.tiers.test_promotion import ROW_BYTES, filled, in_chunks
from tests.tiers.test_tiering import SIZE, Cache, prompt
from tests.tiers.waiting import eventually

pytestmark = pytest.mark.filterwarnings("ignore::kvcache_core.KVCacheWarning")

CONFIG = DecoderConfig(dtype="float64", windows=(None, 6), width=8)
REAL_WAITING = Costs.waiting
LONG = 60
"""Seconds that nothing here takes unless it hangs."""

GENERATE = {"torch": kvcache_torch.generate, "keras": kvcache_keras.generate}


class Gated(RamTier):
    """Where the reader thread waits at a gate; notes who asks for what.

    Attributes:
        gate: open unless a test closes it.
        begun: set when the reader thread asks.
        asked: keys, call by call, of the reader thread and of others.
    """

    persistent = True

    def __init__(self) -> None:
        super().__init__(1 << 26)
        self.gate, self.begun = threading.Event(), threading.Event()
        self.gate.set()
        self.asked: dict[bool, list[list[bytes]]] = {True: [], False: []}
        self.fails = False

    def get_many(self, keys: Any) -> Any:
        ahead = threading.current_thread().name == "kvcache-reading"
        self.asked[ahead].append(list(keys))
        if ahead:
            self.begun.set()
            assert self.gate.wait(LONG)
            if self.fails:
                raise OSError("gone")
        return super().get_many(keys)

    def count(self, *, ahead: bool) -> int:
        return sum(map(len, self.asked[ahead]))


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kvcache-reading"]


@pytest.fixture(autouse=True)
def slow() -> Iterator[None]:
    """Every tier counts as one that is waited for."""
    with patch.object(Costs, "waiting", lambda self, number, nbytes: float(nbytes)):
        yield


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = readers()
    yield
    eventually(lambda: set(readers()) <= set(before))


# ---- generation ---------------------------------------------------------------------------------------------------


def stored(tier: Gated, prefixes: list[list[int]], num_blocks: int = 200) -> NumpyCache:
    """A cache whose pool is empty and whose tier holds the prefixes."""
    cache = NumpyCache(CONFIG, num_blocks, tiers=[tier], promote="always")
    cache.warm([[*prefix, 1] for prefix in prefixes], bar=False)
    assert cache.flush(LONG, everything=True)
    cache.clear()
    tier.asked[False].clear()
    return cache


def texts(count: int, blocks: int = 6) -> list[list[int]]:
    return [[token % CONFIG.vocab for token in prompt(seed, blocks * CONFIG.block_size)] for seed in range(count)]


def watch_steps(cache: Any, name: str, seen: Any) -> Any:
    """Call ``seen`` inside each step of a cache."""
    run = getattr(cache, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen()
        return run(*args, **kwargs)

    return patch.object(cache, name, watched)


def test_the_second_prompt_is_read_while_the_first_is_computed():
    tier, prefixes = Gated(), texts(2)
    cache = stored(tier, prefixes)
    prompts = [[*prefix, 3, 1, 4] for prefix in prefixes]
    tier.gate.clear()
    rows = []

    def step() -> None:
        if not rows:
            assert tier.begun.wait(LONG), "the first prompt is in its step, and the second is being read"
        rows.append(cache.stats().open_sequences)
        if len(rows) == 3:
            tier.gate.set()
            eventually(lambda: cache._tiers.ahead.idle)

    with watch_steps(cache, "_run_all", step):
        found = generate_tokens(CacheDecoder(cache), prompts, GenerateOptions(8))
    assert rows[:3] == [1, 1, 1], "steps do not wait for what is read of other prompts"
    assert max(rows) == 2, "the second joins the first, which runs on"
    assert found == [cache.model.greedy(one, 8) for one in prompts]
    assert cache.stats().prefetched_blocks == tier.count(ahead=True) == 2 * 6, "two layer groups"
    assert tier.count(ahead=False) == 2 * 6, "nothing is read twice"
    assert cache._tiers.ahead.nbytes == 0
    cache.check_at_rest()
    assert cache.close()


def test_a_prompt_behind_one_that_has_no_room_is_read_too():
    tier, prefixes = Gated(), texts(2)
    cache = stored(tier, prefixes, 20)
    prompts = [[*prefixes[0], 1], [4], [*prefixes[1], 1]]
    limits = [3, 12 * CONFIG.block_size, 3]
    read = []

    def step() -> None:
        if not read:
            eventually(lambda: cache._tiers.ahead.idle)
            read.append(tier.count(ahead=True))

    with watch_steps(cache, "_run_all", step):
        found = generate_tokens(CacheDecoder(cache), prompts, GenerateOptions(limits))
    assert read == [2 * 6], "while the first is in its first step"
    assert found == [cache.model.greedy(one, limit) for one, limit in zip(prompts, limits, strict=True)]
    cache.check_at_rest()
    cache.close()


@pytest.mark.parametrize("num_blocks", [30, 60, 400])
@pytest.mark.parametrize("fails", [False, True])
def test_equals_plain_decoding(num_blocks, fails):
    tier, prefixes = Gated(), texts(7, 3)
    cache = stored(tier, prefixes, num_blocks)
    tier.fails = fails
    shared = [*prefixes[0], 5, 6]
    prompts = [*([*prefix, 2] for prefix in prefixes), shared, [*shared, 3], [4, 4, 4]]
    _, plain = decoders(CONFIG, num_blocks)
    expected = generate_tokens(plain, prompts, GenerateOptions(5))
    for _ in range(3):
        cache.clear()
        assert generate_tokens(CacheDecoder(cache), prompts, GenerateOptions(5, prefill_chunk=8)) == expected
    assert tier.count(ahead=True) > 0
    assert (cache.stats().prefetched_blocks > 0) is not fails
    assert (cache.tier_stats()[0].errors > 0) is fails
    assert cache._tiers.ahead.nbytes == 0
    cache.check_at_rest()
    cache.close()


def test_scores_are_read_ahead_too():
    tier, prefixes = Gated(), texts(3)
    cache = stored(tier, prefixes)
    pairs = [([*prefix, 1, 2], [3, 4]) for prefix in prefixes]
    found = score_pairs(CacheDecoder(cache), pairs, 8)
    _, plain = decoders(CONFIG, 200)
    expected = score_pairs(plain, pairs, 8)
    assert [one.greedy_tokens.tolist() for one in found] == [one.greedy_tokens.tolist() for one in expected]
    assert cache.stats().prefetched_blocks > 0
    cache.close()


def test_a_generation_that_fails_forgets_what_was_read():
    tier, prefixes = Gated(), texts(4)
    cache = stored(tier, prefixes)
    cache.fail_at = len(cache.steps)
    tier.gate.clear()
    with pytest.raises(InjectedFault):
        generate_tokens(CacheDecoder(cache), [[*prefix, 1] for prefix in prefixes], GenerateOptions(5))
    tier.gate.set()
    eventually(lambda: cache._tiers.ahead.nbytes == 0)
    cache.check_at_rest()
    cache.close()


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_both_frameworks_read_ahead(framework):
    config = DecoderConfig(windows=(None, 5), heads=2, kv_heads=1, width=8, block_size=3)
    tier, weights = Gated(), make_weights(config)
    backend = tiered(framework, config, weights, 80, [tier])
    cache, prefixes = backend.cache, [[token % config.vocab for token in prompt(seed, 18)] for seed in range(3)]
    cache.warm([[*prefix, 1] for prefix in prefixes], bar=False)
    assert cache.flush(LONG, everything=True)
    cache.clear()
    prompts = [[*prefix, 1, 2] for prefix in prefixes]
    expected = GENERATE[framework](backend.model, prompts, max_new_tokens=4, cache=cache)
    cache.clear()
    with patch.object(cache._tiers.ahead, "limit", 0):
        assert GENERATE[framework](backend.model, prompts, max_new_tokens=4, cache=cache) == expected
    assert cache.stats().prefetched_blocks == 2 * 2 * 6, "two prompts, two layer groups"
    assert cache.close()


# ---- one prompt ---------------------------------------------------------------------------------------------------


def waiting(tier: Any, *prompts: list[int], **options: Any) -> tuple[Cache, list[Ahead]]:
    """A cache of which these prompts are being read ahead, from a tier that holds them."""
    for tokens in prompts:
        filled(tier, tokens)
    tier.asked[False].clear()
    tier.gate.clear()
    cache = Cache(60, [tier], **options)
    return cache, [ahead_of(cache, tokens) for tokens in prompts]


def ahead_of(cache: Cache, tokens: list[int], salt: bytes = b"") -> Ahead:
    cache.core.close(cache.open([1], salt))  # the namespace and the salt are known
    return cache.stack.prefetch(tokens, salt, 0)


def test_opening_a_prompt_waits_for_what_is_being_read_of_it():
    tier, tokens = Gated(), prompt(1)
    cache, (ahead,) = waiting(tier, tokens)
    assert tier.begun.wait(LONG)
    opened = threading.Thread(target=cache.run, args=(tokens,))
    opened.start()
    assert not ahead.done
    tier.gate.set()
    opened.join(LONG)
    assert ahead.done
    assert cache.stack.promoted_tokens == 20
    assert cache.stack.prefetched_blocks == tier.count(ahead=True) == 10
    assert tier.count(ahead=False) == 0, "nothing is read twice"
    ahead.close()
    assert cache.stack.ahead.nbytes == 0
    cache.stack.close()


def test_opening_a_prompt_does_not_wait_for_what_is_being_read_of_another():
    tier, one, other = Gated(), prompt(1), prompt(2)
    cache, (first, second) = waiting(tier, one, other)
    assert tier.begun.wait(LONG)
    assert cache.run(other) == 20
    assert second.done, "called off"
    assert not first.done
    tier.gate.set()
    eventually(lambda: first.done)
    assert tier.count(ahead=True) == tier.count(ahead=False) == 10
    assert cache.run(one) == 20
    first.close()
    second.close()
    cache.stack.close()


def test_what_was_read_ahead_in_part_is_used_and_the_rest_is_read():
    tier, tokens = Gated(), prompt(1, 8 * SIZE + 1)
    with in_chunks(2):
        cache, (ahead,) = waiting(tier, tokens, ahead_bytes=5 * ROW_BYTES)
        tier.gate.set()
        eventually(lambda: ahead.done)
        assert cache.stack.ahead.nbytes == 4 * ROW_BYTES, "as much as may be held"
        later = ahead_of(cache, prompt(2, 4 * SIZE + 1))
        assert not later.done, "there is no room for it"
        assert cache.run(tokens) == 8 * SIZE
        assert tier.count(ahead=True) == tier.count(ahead=False) == 8
        ahead.close()
        eventually(lambda: later.done)
        later.close()
    assert cache.stack.ahead.nbytes == 0
    cache.stack.close()


def test_a_gap_ends_it_and_is_not_asked_again():
    tier, tokens = Gated(), prompt(1, 6 * SIZE + 1)
    keys = filled(tier, tokens)
    tier.delete_many(keys[3])
    with in_chunks(2):
        cache = Cache(60, [tier])
        tier.asked[False].clear()
        ahead = ahead_of(cache, tokens)
        eventually(lambda: ahead.done)
        assert tier.asked[True] == [keys[0] + keys[1], keys[2] + keys[3]]
        assert cache.run(tokens) == 3 * SIZE
    assert tier.count(ahead=False) == 0
    ahead.close()
    cache.stack.close()


@pytest.mark.parametrize("change", ["salt", "weights"])
def test_another_salt_or_other_weights_find_nothing(change):
    tier, tokens = Gated(), prompt(1)
    cache, (ahead,) = waiting(tier, tokens)
    tier.gate.set()
    eventually(lambda: ahead.done)
    if change == "weights":
        cache.core.namespace = b"other"
    assert cache.run(tokens, b"tenant" if change == "salt" else b"") == 0
    ahead.close()
    assert cache.stack.prefetched_blocks == cache.stack.ahead.nbytes == 0
    cache.stack.close()


def test_a_tier_that_fails_is_a_counted_miss():
    tier, tokens = Gated(), prompt(1)
    cache, (ahead,) = waiting(tier, tokens)
    tier.fails = True
    tier.gate.set()
    eventually(lambda: ahead.done)
    assert cache.run(tokens) == 0
    stats = cache.stack.stats[0]
    assert (stats.errors, stats.misses, tier.count(ahead=False)) == (1, 10, 0)
    ahead.close()
    cache.stack.close()


def test_a_tier_that_breaks_its_contract_ends_no_thread():
    tier, tokens = Gated(), prompt(1)
    cache, (ahead,) = waiting(tier, tokens)
    with patch.object(RamTier, "get_many", lambda self, keys: []):
        tier.gate.set()
        eventually(lambda: ahead.done)
    assert len(readers()) == 1
    assert ahead_of(cache, prompt(2)) is not None
    ahead.close()
    cache.stack.close()


def test_closing_does_not_wait_for_a_tier_that_hangs():
    tier, tokens = Gated(), prompt(1)
    cache, (ahead,) = waiting(tier, tokens)
    assert tier.begun.wait(LONG)
    closed = threading.Thread(target=cache.stack.close, args=(0.1,))
    closed.start()
    closed.join(LONG)
    assert not closed.is_alive()
    tier.gate.set()
    eventually(lambda: not readers())
    assert cache.stack.ahead.nbytes == 0
    ahead.close()
    assert cache.stack.prefetch(tokens, b"", 0).done, "nothing begins after it"


def test_what_is_near_is_not_read_ahead():
    near, far, tokens = RamTier(1 << 20), Gated(), prompt(1)
    filled(near, tokens)
    cache = Cache(60, [near, far])
    with patch.object(cache.stack.costs, "waiting", lambda number, nbytes: float(number)):
        assert ahead_of(cache, tokens).done
    assert cache.run(tokens) == 20
    assert not readers()
    cache.stack.close()


def test_what_costs_less_than_it_is_worth_is_not_read_ahead():
    tier, tokens = Gated(), prompt(1)
    filled(tier, tokens)
    cache = Cache(60, [tier])
    cache.open([1])
    cache.stack.computed(100, 100, 100.0)
    nbytes = 5 * ROW_BYTES
    assert cache.stack.prefetch(tokens, b"", nbytes).done
    ahead = cache.stack.prefetch(tokens, b"", nbytes - 1)
    eventually(lambda: ahead.done)
    assert tier.count(ahead=True) == 10
    ahead.close()
    cache.stack.close()


# ---- which tiers are slow -----------------------------------------------------------------------------------------


def test_a_tier_is_slow_where_loading_is_mostly_waiting():
    costs = Costs(stats := [TierStats("busy"), TierStats("slow")], always=False)
    assert REAL_WAITING(costs, 0, 100) == 0.0, "nothing is known yet"
    costs.loaded(0, 1000, 2.0, 1.5)
    costs.loaded(1, 1000, 2.0, 0.5)
    assert REAL_WAITING(costs, 0, 100) == 0.0
    assert REAL_WAITING(costs, 1, 500) == pytest.approx(0.75)
    costs.loaded(1, 1000, 4.0)
    assert stats[1].waiting_share == 0.75, "what was read ahead says nothing about it"
    assert REAL_WAITING(costs, 1, 500) == pytest.approx(0.75 * 1.5)
