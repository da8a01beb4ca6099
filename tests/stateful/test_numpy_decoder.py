"""Random decoders over the numpy store: whatever happens to the cache, the outputs are those of recompute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings

from tests.reference_decoder import (
    DecoderConfig,
    Driver,
    NumpyBackend,
    Script,
    decoder_configs,
    scripts,
)

# What fits the suite's time, and more where a case was not met; the slow tests look further.
EXAMPLES = (60, 240, 960)
LONG = settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def _run(config, script, met: Counter[str], **options) -> None:
    driver = Driver(config, lambda weights: NumpyBackend(config, weights, script.num_blocks), **options)
    driver.run(script)
    driver.report()
    met.update(driver.counts)


def _missing(met: Counter[str], names: Sequence[str]) -> list[str]:
    return [name for name in names if not met[name]]


def _check(configs, script, names: Sequence[str], **options) -> None:
    """The property, until every named case was met: without its interesting case it proves nothing.

    Hypothesis varies what it drew before, so that a case which is not rare can be absent from one run.
    """
    met: Counter[str] = Counter()
    for examples in EXAMPLES:

        @settings(max_examples=examples, deadline=None)
        @given(configs, script)
        def check(config, script):
            _run(config, script, met, **options)

        check()
        if not _missing(met, names):
            return
    raise AssertionError(f"never met: {_missing(met, names)}; met {dict(met)}")


USUAL = (
    "outputs compared", "prefix hits", "CacheFull", "fork", "fail", "rolled back tokens", "ragged batches",
    "split prompts", "resize",
)  # fmt: skip


def test_cached_equals_recompute():
    _check(decoder_configs(), scripts(), [*USUAL, "partial hits"])


def test_cached_equals_recompute_in_a_pool_that_always_evicts():
    # Few open sequences leave the pool to cached blocks, which the next ones evict.
    configs = decoder_configs(block_sizes=(1, 2, 3), max_layers=2)
    names = ["outputs compared", "prefix hits", "evicted_blocks"]
    _check(configs, scripts(min_blocks=6, max_blocks=20), names, max_open=2)


def test_cached_equals_recompute_with_windows_only():
    configs = decoder_configs(only_windows=True, block_sizes=(1, 2, 4))
    _check(configs, scripts(), ["outputs compared", "prefix hits", "rolled back tokens"], max_open=3)


def test_cached_equals_recompute_with_convolutions():
    configs = decoder_configs(convs=True, block_sizes=(1, 2, 3, 4), max_layers=2)
    _check(configs, scripts(), [*USUAL, "truncate refused"], max_open=4)


@pytest.mark.slow
@pytest.mark.parametrize("max_open", [2, 6])
def test_cached_equals_recompute_at_length(max_open):
    met: Counter[str] = Counter()

    @LONG
    @given(decoder_configs(max_layers=4), scripts(max_actions=50, min_blocks=2))
    def check(config, script):
        _run(config, script, met, max_open=max_open)

    check()
    missing = _missing(met, ["evicted_blocks", "truncate refused", "resize refused"])
    assert not missing, f"never met: {missing}; met {dict(met)}"


def test_a_wrong_store_is_noticed():
    """The check can fail: one value of a published block is off by a little."""

    class Broken(NumpyBackend):
        def step(self, seqs, token_lists, fail=None):
            logits = super().step(seqs, token_lists, fail)
            self.store.arrays[0, "v"][0, self.core.block_size + 1] += 1e-3
            return logits

    rows = ((0, 50, 0),)
    script = Script(
        16,
        (
            ("open", 0, 12, (1, 2), 0),
            ("step", rows),
            ("step", rows),
            ("close", 0),
            ("open", 0, 12, (3,), 0),
            ("step", rows),
        ),
    )
    for seed in range(4):
        config = DecoderConfig(seed=seed)
        Driver(config, partial(NumpyBackend, config, num_blocks=16)).run(script)
        with pytest.raises(AssertionError, match="cached error"):
            Driver(config, partial(Broken, config, num_blocks=16)).run(script)
