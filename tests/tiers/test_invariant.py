"""Invariant 1 through tiers: what was evicted and came back gives the outputs of full recompute."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache_core.tiers import RamTier
from tests.reference_decoder import Driver, decoder_configs, make_weights, scripts
from tests.tiers.backends import tiered

FRAMEWORKS = ("torch", "keras")


@pytest.mark.parametrize("framework", FRAMEWORKS)
@given(data=st.data())
@settings(max_examples=8)
def test_random_scripts_with_little_room(framework, data):
    """Forks, truncations, faults and resizes over a pool that loses blocks all the time."""
    config = data.draw(decoder_configs(max_layers=3))
    script = data.draw(scripts(max_blocks=10, max_actions=20))
    with ExitStack() as opened:

        def make(weights):
            backend = tiered(framework, config, weights, script.num_blocks, [RamTier(1 << 24)])
            opened.callback(backend.cache.close)
            return backend

        driver = Driver(config, make)
        driver.run(script)
        driver.report()


@pytest.mark.parametrize("framework", FRAMEWORKS)
@given(config=decoder_configs(max_layers=3), budget=st.sampled_from([1 << 12, 1 << 15, 1 << 24]))
@settings(max_examples=5)
def test_every_step_demotes_and_promotes(framework, config, budget):
    """Three prompts take turns in a pool that holds one: each turn evicts another's blocks and takes its own back."""
    size = config.block_size
    prompts = [[(5 * row + at * at) % config.vocab for at in range(4 * size + 1)] for row in range(3)]
    backend = tiered(framework, config, make_weights(config), 6, [RamTier(budget)])
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
        stats = cache.stats()
        assert stats.demoted_blocks
        if budget == 1 << 24:
            assert stats.promoted_tokens == 6 * 4 * size  # all but the last token of each later turn
            assert stats.miss_tokens == 3 * len(prompts[0]) + 6
    finally:
        cache.close()
