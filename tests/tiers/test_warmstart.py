"""A whole cache to a file and back: same framework, the other one, and files that must be refused."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import kvcache_torch
from kvcache_core import InvalidInput, KVCacheWarning, UsageError
from kvcache_core.errors import BlockRefused, TierError
from kvcache_core.tier_file import FileTier
from kvcache_core.tiers import open_tier
from tests.adapters.torch.models import Small
from tests.reference_decoder import DecoderConfig, decoder_configs, make_weights
from tests.tiers.backends import CACHES, over, plain, tiered

PLAIN = DecoderConfig(windows=(None, 5), heads=2, kv_heads=1, width=8, block_size=3)
WEIGHTS = make_weights(PLAIN)


def prompts(config: DecoderConfig) -> list[list[int]]:
    draw = np.random.default_rng(7)
    length = 4 * config.block_size + 1
    return [[row, *draw.integers(0, config.vocab, length - 1).tolist()] for row in range(3)]


def check(backend: Any, prompt: list[int], cached: int) -> None:
    """``cached`` tokens of the prompt are there, and its logits are those of the whole prompt computed anew."""
    seq = backend.cache.open(prompt)
    assert seq.num_cached == cached
    logits = backend.cache.step([seq], [prompt[cached:]])[0]
    expected = backend.uncached(prompt)[-1]
    assert abs(logits - expected).max() < 2e-4 * max(1.0, abs(expected).max())
    seq.close()
    backend.cache.core.check_valid()


def saved(framework: str, path: Path, config: DecoderConfig = PLAIN) -> Any:
    backend = plain(framework, config, make_weights(config), 40)
    for prompt in prompts(config):
        check(backend, prompt, 0)
    backend.cache.save(path)
    return backend


def loaded(framework: str, path: Path, config: DecoderConfig = PLAIN, **options: Any) -> Any:
    cache = CACHES[framework].load(path, **{"promote": "always", **options})
    return over(framework, config, make_weights(config), cache)


@pytest.mark.parametrize("writer", ["torch", "keras"])
@pytest.mark.parametrize("reader", ["torch", "keras"])
@given(config=decoder_configs(max_layers=2))
@settings(max_examples=3)
def test_saved_here_and_loaded_there(tmp_path_factory, writer, reader, config):
    path = tmp_path_factory.mktemp("saved") / "cache"
    first = saved(writer, path, config)
    other = loaded(reader, path, config)
    assert (other.cache.core.num_blocks, other.cache.core.block_size) == (40, config.block_size)
    for prompt in prompts(config):
        check(other, prompt, 4 * config.block_size)
    assert other.cache.stats().promoted_tokens == 3 * 4 * config.block_size
    check(first, prompts(config)[0], 4 * config.block_size)  # saving took nothing away
    assert other.cache.close()


def test_two_tenants_are_saved_and_stay_apart(tmp_path):
    backend = plain("torch", PLAIN, WEIGHTS, 40)
    for salt in (b"alice", b"bob"):
        backend.cache.salt = salt
        check(backend, prompts(PLAIN)[salt == b"bob"], 0)
    backend.cache.save(tmp_path / "cache")
    other = loaded("torch", tmp_path / "cache", salt=b"alice")
    check(other, prompts(PLAIN)[1], 0)
    check(other, prompts(PLAIN)[0], 12)
    other.cache.salt = b"bob"
    check(other, prompts(PLAIN)[1], 12)
    assert b"alice" not in (tmp_path / "cache").read_bytes()


def test_weights_that_changed_are_not_saved(tmp_path):
    backend = plain("torch", PLAIN, make_weights(PLAIN), 40)  # its arrays are the model's memory
    first, second, _ = prompts(PLAIN)
    check(backend, first, 0)
    with torch.no_grad():
        backend.decoder.named["head"].mul_(2)
    check(backend, second, 0)
    assert backend.cache.save(tmp_path / "cache") == 2 * 4
    changed = make_weights(PLAIN)
    changed["head"] *= 2
    other = plain("torch", PLAIN, changed, 40)
    other.serve_with(kvcache_torch.KVCache.load(tmp_path / "cache"))
    check(other, first, 0)
    check(other, second, 12)


def test_named_weights_that_changed_before_saving_are_nobodys(tmp_path):
    model = Small().eval()
    cache = kvcache_torch.KVCache(40, block_size=4)
    cache.attach(model, outputs="last", identity="small@1")
    cache.warm([list(range(17))])
    with torch.no_grad():
        model.head.weight.mul_(2)
    cache.warm([list(range(17))])
    cache.save(tmp_path / "cache")
    cache.detach()
    other = kvcache_torch.KVCache.load(tmp_path / "cache")
    other.attach(Small().eval(), outputs="last", identity="small@1")
    with pytest.raises(BlockRefused, match="of other weights"):
        other.open([1, 2, 3])


def test_stored_outputs_are_saved_too(tmp_path):
    model, row = Small().eval(), torch.arange(21)[None]
    expected = model(row)
    cache = kvcache_torch.KVCache(40, block_size=4)
    cache.attach(model)
    with torch.no_grad(), cache:
        model(row)
    cache.save(tmp_path / "cache")
    cache.detach()
    other = kvcache_torch.KVCache.load(tmp_path / "cache")
    other.attach(model)
    with torch.no_grad(), other:
        assert torch.allclose(model(row), expected, atol=1e-5)
    assert other.stats().hit_tokens == 20


def test_what_the_ram_tier_and_the_file_hold_is_saved_again(tmp_path):
    backend = tiered("torch", PLAIN, WEIGHTS, 6, ["ram:1MiB"])
    for prompt in prompts(PLAIN):
        check(backend, prompt, 0)
    backend.cache.save(tmp_path / "one")
    again = loaded("torch", tmp_path / "one")
    check(again, prompts(PLAIN)[1], 12)
    again.cache.save(tmp_path / "one")  # over the file that is being read
    check(again, prompts(PLAIN)[2], 12)
    last = loaded("torch", tmp_path / "one")
    for prompt in prompts(PLAIN):
        check(last, prompt, 12)


def test_a_bound_on_the_bytes(tmp_path):
    backend = saved("torch", tmp_path / "cache")
    whole = (tmp_path / "cache").stat().st_size
    count = backend.cache.save(tmp_path / "cache", max_bytes=whole // 2)
    assert 0 < count < 3 * 8
    assert (tmp_path / "cache").stat().st_size < whole
    with pytest.raises(InvalidInput, match="memory must be a size"):
        backend.cache.save(tmp_path / "cache", max_bytes="lots")


def test_options_win_over_the_file(tmp_path):
    saved("torch", tmp_path / "cache")
    other = loaded("torch", tmp_path / "cache", size=10, tiers="ram:1MiB")
    assert other.cache.core.num_blocks == 10
    assert [stats.name.split(":")[0] for stats in other.cache.tier_stats()] == ["ram", "file"]
    for _ in range(2):
        for prompt in prompts(PLAIN):
            check(other, prompt, 12)
    wider = kvcache_torch.KVCache.load(tmp_path / "cache", block_size=5)
    wider.attach(Small().eval(), outputs="last")
    with pytest.raises(BlockRefused, match="other layout"):
        wider.open([1, 2, 3])
    wider.detach()


def test_nothing_is_written_to_a_saved_cache(tmp_path):
    saved("torch", tmp_path / "cache")
    before = (tmp_path / "cache").read_bytes()
    other = loaded("torch", tmp_path / "cache", size=6)
    new = [[9, *prompt[1:]] for prompt in prompts(PLAIN)]
    for prompt in (*prompts(PLAIN), *new, *prompts(PLAIN)):
        seq = other.cache.open(prompt)
        other.cache.step([seq], [prompt[seq.num_cached :]])
        seq.close()
    assert other.cache.flush(5, everything=True)
    assert other.cache.close()
    assert other.cache.stats().dropped_blocks == 0
    assert (tmp_path / "cache").read_bytes() == before


def all_served(other: Any, backend: Any) -> int:
    """Answer every prompt; returns how many values did not verify."""
    for prompt in prompts(PLAIN):
        seq = other.cache.open(prompt)
        logits = other.cache.step([seq], [prompt[seq.num_cached :]])[0]
        expected = backend.uncached(prompt)[-1]
        assert abs(logits - expected).max() < 2e-4 * max(1.0, abs(expected).max())
        seq.close()
    return int(other.cache.tier_stats()[0].refused)


@pytest.mark.parametrize("secret", ["", "s"])
def test_every_damage_is_refused_or_a_miss(tmp_path, monkeypatch, secret):
    monkeypatch.setenv("KVCACHE_SECRET", secret)
    backend = saved("torch", tmp_path / "cache")
    whole = (tmp_path / "cache").read_bytes()
    with FileTier(tmp_path / "cache")._file as file:
        assert file.read(8) == b"KVSAVED1"
    draw = np.random.default_rng(0)
    refused = missed = 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[draw.integers(len(whole))] ^= 1 << int(draw.integers(8))
        (tmp_path / "bad").write_bytes(damaged)
        try:
            tier = FileTier(tmp_path / "bad")
        except BlockRefused:
            refused += 1
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KVCacheWarning)
            missed += all_served(tiered("torch", PLAIN, WEIGHTS, 40, [tier]), backend)
        tier.close()
    assert refused
    assert missed
    for length in [0, 7, 8, *draw.integers(0, len(whole), 40).tolist()]:
        (tmp_path / "bad").write_bytes(whole[:length])
        with pytest.raises(BlockRefused):
            FileTier(tmp_path / "bad")
    (tmp_path / "bad").write_bytes(whole + b"x")
    with pytest.raises(BlockRefused, match="cut short or damaged"):
        kvcache_torch.KVCache.load(tmp_path / "bad")


def test_a_file_of_another_secret_is_refused(tmp_path, monkeypatch):
    saved("torch", tmp_path / "cache")
    monkeypatch.setenv("KVCACHE_SECRET", "s")
    with pytest.raises(BlockRefused, match="signed with another secret"):
        kvcache_torch.KVCache.load(tmp_path / "cache")


def test_bad_input(tmp_path):
    with pytest.raises(UsageError, match="no model is attached"):
        kvcache_torch.KVCache(8).save(tmp_path / "cache")
    with pytest.raises(FileNotFoundError):
        kvcache_torch.KVCache.load(tmp_path / "nowhere")
    (tmp_path / "text").write_text("nothing of ours, but long enough to be one: " * 9)
    with pytest.raises(BlockRefused, match="no saved cache"):
        kvcache_torch.KVCache.load(tmp_path / "text")
    with pytest.raises(TierError, match=r"tier 'file:.*' cannot be opened .* cache.save\(path\) makes such a file"):
        open_tier(f"file:{tmp_path / 'nowhere'}")
    backend = saved("torch", tmp_path / "cache")
    before = (tmp_path / "cache").read_bytes()
    with pytest.raises(OSError, match="No such file"):
        backend.cache.save(tmp_path / "none" / "cache")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        backend.cache.save(tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["cache", "folder", "text"]
    assert (tmp_path / "cache").read_bytes() == before
    with pytest.raises(BlockRefused):
        backend.cache.load(tmp_path / "cache")  # that is for one sequence
