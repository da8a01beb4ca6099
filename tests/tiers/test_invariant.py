"""Invariant 1 through every tier: what was evicted and came back gives the outputs of full recompute."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.fsspec_tier import FileSystemTier
from kvcache_core.tiers import RamTier
from tests.reference_decoder import Driver, decoder_configs, make_weights, scripts
from tests.tiers.backends import tiered

FRAMEWORKS = ("torch", "keras")
KINDS = ("ram", "disk", "network", "network, in parts", "fsspec", "all")
CONFIGS = decoder_configs(max_layers=2)  # one with a window and one without: blocks of two kinds
Make = Callable[[str], list[Any]]


@pytest.fixture(scope="session")
def make_tiers(tmp_path_factory, valkey_server) -> Make:
    """Empty tiers of a kind."""
    numbers = count()

    def make(kind: str) -> list[Any]:
        with valkey_server.client() as client:
            client.flushall()
        disk = f"disk:{tmp_path_factory.mktemp('tier')}?max=64MiB&sync=off"
        network = f"valkey://127.0.0.1:{valkey_server.port}/0?ttl=600&timeout=5"
        return {
            "ram": [RamTier(1 << 24)],
            "disk": [disk],
            "network": [network],
            "network, in parts": [f"{network}&split=1000"],
            "fsspec": [FileSystemTier(fsspec.filesystem("memory"), f"/invariant-{next(numbers)}")],
            "all": ["ram:4kB", network, disk],
        }[kind]

    return make


@pytest.mark.parametrize(("framework", "examples"), [("torch", 8), ("keras", 4)])
def test_random_scripts_with_little_room(make_tiers, framework, examples):
    """Forks, truncations, faults and resizes over a pool that loses blocks all the time."""

    @given(CONFIGS, scripts(max_blocks=10, max_actions=20), st.sampled_from(["ram", "all"]))
    @settings(max_examples=examples)
    def check(config, script, kind):
        with ExitStack() as opened:

            def make(weights):
                backend = tiered(framework, config, weights, script.num_blocks, make_tiers(kind))
                opened.callback(backend.cache.close)
                return backend

            driver = Driver(config, make)
            driver.run(script)
            driver.report()

    check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
@given(config=CONFIGS)
@settings(max_examples=2)
def test_every_step_demotes_and_promotes(make_tiers, framework, kind, config):
    """Three prompts take turns in a pool that holds one: each turn evicts another's blocks and takes its own back."""
    whole = 4 * config.block_size
    stats = turns(framework, config, make_tiers(kind))
    assert stats.promoted_tokens == 6 * whole  # all but the last token of each later turn
    assert stats.miss_tokens == 3 * (whole + 1) + 6


@pytest.mark.parametrize(("framework", "examples"), [("torch", 5), ("keras", 3)])
def test_tiers_too_small_for_it_all(framework, examples):
    @given(CONFIGS, st.sampled_from([1 << 12, 1 << 15]))
    @settings(max_examples=examples)
    def check(config, budget):
        assert turns(framework, config, [RamTier(budget)]).demoted_blocks

    check()


def turns(framework: str, config: Any, tiers: list[Any]) -> Any:
    """Nine turns, each compared with computing all of it; the cache's statistics."""
    prompts = [[(5 * row + at * at) % config.vocab for at in range(4 * config.block_size + 1)] for row in range(3)]
    backend = tiered(framework, config, make_weights(config), 6, tiers)
    cache = backend.cache
    try:
        expected = [backend.uncached(prompt)[-1] for prompt in prompts]
        for turn in range(9):
            seq = cache.open(prompts[turn % 3])
            logits = cache.step([seq], [prompts[turn % 3][seq.num_cached :]])[0]
            assert abs(logits - expected[turn % 3]).max() < 2e-4 * max(1.0, abs(expected[turn % 3]).max())
            seq.close()
            assert cache.flush(10)
            cache.core.check_valid()
        assert all(stats.errors == stats.refused == 0 for stats in cache.tier_stats())
        return cache.stats()
    finally:
        cache.close()
