"""PyTorch and Keras share what lies in a tier: same weights, same identity, and one's block serves the other."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import kvcache_keras
import kvcache_torch
from kvcache_core import KVCacheWarning
from kvcache_core.admission import AfterSightings
from kvcache_core.tiers import RamTier
from tests.adapters.torch.models import Small
from tests.reference_decoder import DecoderConfig, decoder_configs, make_weights, run_uncached
from tests.tiers.backends import tiered

PLAIN = DecoderConfig(windows=(None, 5), heads=2, kv_heads=1, width=8, block_size=3)


def prompts(config: DecoderConfig) -> list[list[int]]:
    length = 4 * config.block_size + 1
    return [[seed, *np.random.default_rng(seed).integers(0, config.vocab, length - 1).tolist()] for seed in range(3)]


def run(backend: Any, prompt: list[int]) -> tuple[np.ndarray, int]:
    """Logits behind the prompt, and how many of its tokens were cached."""
    seq = backend.cache.open(prompt)
    try:
        return backend.cache.step([seq], [prompt[seq.num_cached :]])[0], seq.num_cached
    finally:
        seq.close()


def check(backend: Any, prompt: list[int], cached: int) -> None:
    logits, found = run(backend, prompt)
    assert found == cached
    expected = backend.uncached(prompt)[-1]
    assert abs(logits - expected).max() < 2e-4 * max(1.0, abs(expected).max())


@pytest.mark.parametrize(("writer", "reader"), [("torch", "keras"), ("keras", "torch")])
@given(config=decoder_configs(max_layers=2), seed=st.integers(0, 9))
@settings(max_examples=4, phases=[Phase.generate])
def test_a_block_of_one_serves_the_other(writer, reader, config, seed):
    tier, weights = RamTier(1 << 24), make_weights(config)
    one = tiered(writer, config, weights, 8, [tier])
    other = tiered(reader, config, weights, 8, [tier])
    first, second, third = prompts(config)
    for prompt in (first, second, third):
        check(one, prompt, 0)
        assert one.cache.flush(10)
    whole = 4 * config.block_size
    check(other, first, whole)
    assert other.cache.stats().promoted_tokens == whole
    one.cache._tiers.queue.close(0)
    other.cache.close()


@pytest.mark.parametrize(("writer", "reader"), [("torch", "keras"), ("keras", "torch")])
@given(config=decoder_configs(max_layers=2), seed=st.integers(0, 9))
@settings(max_examples=3, phases=[Phase.generate])
def test_what_one_has_published_serves_the_other_at_once(tmp_path_factory, writer, reader, config, seed):
    url, weights = f"disk:{tmp_path_factory.mktemp('tier')}?max=64MiB&sync=off", make_weights(config)
    one = tiered(writer, config, weights, 40, [url], write_through=True)
    other = tiered(reader, config, weights, 40, [url])
    prompt = prompts(config)[seed % 3]
    held = one.cache.open(prompt)
    for token in prompt[:-1]:
        one.cache.step([held], [[token]])
    assert one.cache.flush(10)
    assert one.cache.stats().evicted_blocks == 0
    check(other, prompt, 4 * config.block_size)
    held.close()
    assert one.cache.close()
    assert other.cache.close()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
@pytest.mark.parametrize(("writer", "reader"), [("torch", "keras"), ("keras", "torch")])
def test_a_lossy_block_of_one_serves_the_other(writer, reader, dtype):
    config, tier = replace(PLAIN, dtype="float64"), RamTier(1 << 24)
    weights = make_weights(config)
    one, other, exact = (
        tiered(name, config, weights, 8, [tier], dtype=stored)
        for name, stored in ((writer, dtype), (reader, dtype), (reader, None))
    )
    for prompt in prompts(config):
        run(one, prompt)
        assert one.cache.flush(10)
    first = prompts(config)[0]
    logits, cached = run(other, first)
    assert cached == 4 * config.block_size
    expected = run_uncached(config, weights, first, np.float64, dtype)[-1]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6)
    assert run(exact, first)[1] == 0, "another stored dtype is another layout"


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_a_changed_element_is_another_model(framework):
    tier = RamTier(1 << 24)
    weights = make_weights(PLAIN)
    one = tiered(framework, PLAIN, weights, 8, [tier])
    for prompt in prompts(PLAIN):
        check(one, prompt, 0)
        one.cache.flush(10)
    changed = {name: value.copy() for name, value in weights.items()}
    changed["head"].flat[3] = np.nextafter(changed["head"].flat[3], np.float32(1e9))
    other = tiered(framework, PLAIN, changed, 8, [tier])
    check(other, prompts(PLAIN)[0], 0)


def test_both_frameworks_name_the_same_weights_alike():
    weights = make_weights(PLAIN)
    found = [tiered(name, PLAIN, weights, 8, [RamTier(1000)]).cache._portable_identity() for name in ("torch", "keras")]
    assert found[0] == found[1]


def test_weights_can_be_named_by_hand():
    tier = RamTier(1 << 24)
    model = Small().eval()
    found = []
    for identity in ("small@1", "small@1", "small@2"):
        cache = kvcache_torch.KVCache(5, block_size=4, tiers=[tier], promote="always")
        cache.attach(model, outputs="last", identity=identity)
        for start in range(3):
            seq = cache.open(list(range(start, start + 17)))
            found.append(seq.num_cached)
            cache.step([seq], [list(range(start + seq.num_cached, start + 17))])
            seq.close()
            cache.flush(5)
        cache.detach()
    assert found[0] == 0
    assert found[3] == 16
    assert found[6] == 0


def test_named_weights_that_change_are_noticed():
    tier = RamTier(1 << 24)
    cache = kvcache_torch.KVCache(8, block_size=4, tiers=[tier], promote="always")
    model = cache.attach(Small().eval(), outputs="last", identity="small@1")
    row = torch.arange(17)[None]
    with torch.no_grad(), cache:
        model(row)
        model.head.weight.mul_(2)
        changed = model(row)
    assert torch.allclose(changed[:, -1], model(row)[:, -1], atol=1e-5)


def test_weights_that_change_are_noticed_and_those_before_are_found_again():
    tier = RamTier(1 << 24)
    backend = tiered("torch", PLAIN, make_weights(PLAIN), 8, [tier])
    first, second, _ = prompts(PLAIN)
    for prompt in (first, second, first):
        run(backend, prompt)
        backend.cache.flush(5)
    with torch.no_grad():
        backend.decoder.named["head"].mul_(2)
    check(backend, first, 0)
    backend.cache.flush(5)
    with torch.no_grad():
        backend.decoder.named["head"].div_(2)
    _, cached = run(backend, first)
    assert cached > 0


def test_invalidate_reaches_into_the_tiers():
    tier = RamTier(1 << 24)
    backend = tiered("torch", PLAIN, make_weights(PLAIN), 8, [tier])
    for prompt in prompts(PLAIN):
        run(backend, prompt)
        backend.cache.flush(5)
    backend.cache.invalidate()
    check(backend, prompts(PLAIN)[0], 0)


def test_a_warm_start_needs_the_url_and_nothing_else(tmp_path):
    url, weights = f"disk:{tmp_path}?max=64MiB&sync=off", make_weights(PLAIN)
    first = tiered("torch", PLAIN, weights, 20, [url])
    for prompt in prompts(PLAIN):
        check(first, prompt, 0)
    assert first.cache.close()
    again = tiered("keras", PLAIN, weights, 20, ["ram:1MiB", url])
    for prompt in prompts(PLAIN):
        check(again, prompt, 4 * PLAIN.block_size)
    assert again.cache.close()


def test_a_forgotten_cache_closes_its_tiers(tmp_path):
    url, weights = f"disk:{tmp_path}?max=64MiB&sync=off", make_weights(PLAIN)
    backend = tiered("torch", PLAIN, weights, 20, [url])
    run(backend, prompts(PLAIN)[0])
    backend.cache._closer()
    again = tiered("torch", PLAIN, weights, 20, [url])
    check(again, prompts(PLAIN)[0], 4 * PLAIN.block_size)
    again.cache.close()


def test_whole_outputs_come_back_too():
    """``model(x)``: the layer group of stored outputs is demoted and promoted with the others."""
    model = Small().eval()
    cache = kvcache_torch.KVCache(6, block_size=4, tiers=["ram:1MiB"], promote="always")
    cache.attach(model)
    rows = [torch.arange(start, start + 21)[None] for start in (0, 7, 14)]
    expected = [model(row) for row in rows]
    with torch.no_grad(), cache:
        for turn in range(6):
            assert torch.allclose(model(rows[turn % 3]), expected[turn % 3], atol=1e-5)
            assert cache.flush(5)
    assert cache.stats().promoted_tokens == 3 * 20
    assert [stats.name for stats in cache.tier_stats()] == ["ram"]
    assert cache.close()
    with torch.no_grad(), cache:
        assert torch.allclose(model(rows[0]), expected[0], atol=1e-5)


def test_a_tier_that_fails_never_fails_the_model():
    class Failing(RamTier):
        def get_many(self, keys):
            raise OSError("gone")

        put_many = get_many

    cache = kvcache_torch.KVCache(6, block_size=4, tiers=[Failing(1000)])
    model = cache.attach(Small().eval())
    rows = [torch.arange(start, start + 21)[None] for start in (0, 7, 14)]
    expected = [model(row) for row in rows]
    with warnings.catch_warnings(), torch.no_grad(), cache:
        warnings.simplefilter("ignore", KVCacheWarning)
        for turn in range(6):
            assert torch.allclose(model(rows[turn % 3]), expected[turn % 3], atol=1e-5)
    assert cache.tier_stats()[0].errors > 0
    cache._tiers.queue.close(0)


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_what_was_computed_once_is_not_written(framework):
    one = tiered(framework, PLAIN, make_weights(PLAIN), 8, [RamTier(1 << 24)], admit=AfterSightings(2))
    for cached in (0, 0, 4 * PLAIN.block_size):
        for prompt in prompts(PLAIN):
            check(one, prompt, cached)
            assert one.cache.flush(10)
    one.cache.close()


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_a_tier_that_costs_more_than_computing_is_left_out(framework):
    """What computing a prompt costs is measured as it is served, and shown; what loading costs is told here."""
    one = tiered(framework, PLAIN, make_weights(PLAIN), 8, [RamTier(1 << 24)], promote="auto")
    whole, costs = 4 * PLAIN.block_size, one.cache._tiers.costs
    first, second, third = prompts(PLAIN)
    for prompt in (first, second, third):
        check(one, prompt, 0)
        assert one.cache.flush(10)
    for _ in range(50):
        costs.loaded(0, 1, 1e9)
    check(one, first, 0)
    stats = one.cache.tier_stats()[0]
    assert (stats.hits, stats.skipped) == (0, 1)
    assert 0 < stats.recompute_seconds_per_mib < stats.seconds_per_mib
    assert one.cache.flush(10)
    for _ in range(200):
        costs.loaded(0, 1 << 40, 1e-9)
    check(one, second, whole)
    stats = one.cache.tier_stats()[0]
    assert stats.hits > 0
    assert stats.recompute_seconds_per_mib > stats.seconds_per_mib > 0
    one.cache.close()


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_one_changed_element_of_smollm2_is_another_model(framework):
    """One bit of one of its 135 million elements, in a layer in the middle."""
    smollm2 = pytest.importorskip("smollm2")
    example = importlib.import_module(f"llama_{framework}")
    model = example.from_checkpoint(smollm2.load_checkpoint())
    before = identity_of(framework, model)
    assert identity_of(framework, model) == before
    if framework == "torch":
        list(model.parameters())[100].view(torch.int32).view(-1)[-7] ^= 1
    else:
        values = model.weights[100].numpy().copy()
        values.view(np.int32).flat[-7] ^= 1
        model.weights[100].assign(values)
    assert identity_of(framework, model) != before


def identity_of(framework: str, model: Any) -> bytes:
    cache = {"torch": kvcache_torch, "keras": kvcache_keras}[framework].KVCache(64, tiers=["ram:1MiB"])
    cache.attach(model, outputs="last")
    identity = cache._portable_identity()
    cache.detach()
    cache.close()
    return identity


@pytest.mark.slow
def test_smollm2_is_the_same_model_in_both_frameworks():
    smollm2 = pytest.importorskip("smollm2")
    checkpoint = smollm2.load_checkpoint()
    found = []
    for framework in (kvcache_torch, kvcache_keras):
        example = importlib.import_module(f"llama_{framework.__name__.removeprefix('kvcache_')}")
        cache = framework.KVCache(64, tiers=["ram:1MiB"])
        cache.attach(example.from_checkpoint(checkpoint), outputs="last")
        found.append((cache.core.layout.digest, cache._portable_identity()))
    assert found[0] == found[1]
