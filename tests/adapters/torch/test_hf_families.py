"""Every decoder family of transformers in every mode: with the cache as without it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from kvcache_core.testing import assert_cached_equals_recompute
from kvcache_torch import KVCache
from kvcache_torch.hf import HFCache
from tests.adapters.torch.hf_models import DECODERS, PAD, VOCAB, decoder
from tests.supported import claimed, proven

TABLE = "PyTorch: transformers"
FAMILIES = list(DECODERS)
each_family = pytest.mark.parametrize("family", FAMILIES)
MODES = {
    *("forward", "stepwise", "greedy", "sampling", "padding", "beam search", "several sequences", "assisted"),
    *("continued", "small pool"),
}

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")


def prompts(rows: int, length: int, shared: int, seed: int = 0) -> torch.Tensor:
    """Random ids [rows, length] whose first ``shared`` are the same in every row."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, length), generator=random)
    ids[:, :shared] = ids[:1, :shared]
    return ids


def attached(family: str, size: int = 256) -> tuple[Any, KVCache]:
    model = decoder(family)
    cache = KVCache(size=size, block_size=4)
    cache.attach(model)
    return model, cache


def check_idle(cache: KVCache) -> None:
    """Nothing is held any more, and nothing went around the cache."""
    cache.core.check_valid()
    stats = cache.stats()
    assert stats.open_sequences == 0 == stats.live_blocks
    assert stats.bypassed_calls == 0


def test_the_table_claims_what_is_tested_here_and_no_more() -> None:
    mine = {(family, mode) for family in FAMILIES for mode in MODES}
    assert {cell for cell in claimed(TABLE) if cell[0] in FAMILIES} == mine


@each_family
def test_forward_and_stepwise(family: str) -> None:
    model, cache = attached(family, size=512)
    assert_cached_equals_recompute(model, cache, max_length=24, rounds=2)
    check_idle(cache)
    proven(TABLE, family, "forward")
    proven(TABLE, family, "stepwise")


@each_family
def test_greedy(family: str) -> None:
    model, cache = attached(family)
    first, second = prompts(3, 45, 40), prompts(2, 47, 40)
    with torch.no_grad():
        expected = [model.generate(ids, max_new_tokens=6, do_sample=False) for ids in (first, second)]
    for _ in range(2):  # the second time everything is there
        for ids, plain in zip((first, second), expected, strict=True):
            cached = model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=HFCache(cache))
            assert torch.equal(cached, plain)
    reused = cache.stats().hit_tokens
    assert reused >= 2 * 40 + 2 * 40 + 3 * 44 + 2 * 46  # rows of a batch share too; the last token is never reused
    with cache:
        assert torch.equal(model.generate(first, max_new_tokens=6, do_sample=False), expected[0])
    assert cache.stats().hit_tokens == reused + 3 * 44
    check_idle(cache)
    proven(TABLE, family, "greedy")


@each_family
def test_sampling(family: str) -> None:
    model, cache = attached(family)
    ids = prompts(2, 13, 9)

    def sample(**more: Any) -> torch.Tensor:
        torch.manual_seed(5)
        result: torch.Tensor = model.generate(ids, max_new_tokens=6, do_sample=True, top_k=20, temperature=0.9, **more)
        return result

    assert torch.equal(sample(past_key_values=HFCache(cache)), sample())
    check_idle(cache)
    proven(TABLE, family, "sampling")


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(family: str, side: str) -> None:
    model, cache = attached(family)
    lengths = [5, 17, 11]
    ids, mask = torch.full((3, 17), PAD), torch.zeros(3, 17, dtype=torch.int64)
    for row, (tokens, length) in enumerate(zip(prompts(3, 17, 4), lengths, strict=True)):
        at = slice(0, length) if side == "right" else slice(17 - length, 17)
        ids[row, at], mask[row, at] = tokens[:length], 1
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        with cache:
            for _ in range(2):
                cached = model(ids, attention_mask=mask).logits
                difference = (cached - plain)[mask.bool()].abs().max()
                assert difference <= 64 * torch.finfo(torch.float32).eps * plain.abs().max()
                assert not cached[~mask.bool()].any()
    new = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, past_key_values=HFCache(cache))
    for row, length in enumerate(lengths):  # as every row alone; transformers itself needs the padding on the left
        alone = model.generate(ids[row][mask[row].bool()][None], max_new_tokens=5, do_sample=False)
        assert torch.equal(new[row, 17:], alone[0, length:])
    check_idle(cache)
    proven(TABLE, family, "padding")


@each_family
def test_beam_search(family: str) -> None:
    model, cache = attached(family)
    ids = prompts(2, 14, 9)
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, past_key_values=HFCache(cache), **options), plain)
    assert cache.stats().miss_tokens <= 14 + 14  # the beams of a prompt are computed once
    with cache:
        assert torch.equal(model.generate(ids, **options), plain)
    check_idle(cache)
    proven(TABLE, family, "beam search")


@each_family
def test_several_sequences(family: str) -> None:
    model, cache = attached(family)
    ids = prompts(1, 14, 0)

    def sample(**more: Any) -> torch.Tensor:
        torch.manual_seed(3)
        result: torch.Tensor = model.generate(ids, max_new_tokens=5, do_sample=True, num_return_sequences=3, **more)
        return result

    assert torch.equal(sample(past_key_values=HFCache(cache)), sample())
    assert cache.stats().miss_tokens <= 14
    check_idle(cache)
    proven(TABLE, family, "several sequences")


@each_family
def test_assisted(family: str) -> None:
    model, cache = attached(family)
    helper = decoder(family, seed=1)
    ids = prompts(1, 21, 0).repeat(1, 2)  # repeats itself, so that looking up the prompt gives candidates
    plain = model.generate(ids, max_new_tokens=9, do_sample=False)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": helper}):
        out = model.generate(ids, max_new_tokens=9, do_sample=False, past_key_values=HFCache(cache), **options)
        assert torch.equal(out, plain)
    assert cache.stats().hit_tokens > 30
    check_idle(cache)
    proven(TABLE, family, "assisted")


@each_family
def test_continued(family: str) -> None:
    model, cache = attached(family)
    kept = HFCache(cache)
    ids = prompts(2, 11, 6)
    for turn in range(3):
        plain = model.generate(ids, max_new_tokens=4, do_sample=False)
        computed = cache.stats().miss_tokens
        out = model.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=kept)
        assert torch.equal(out, plain)
        assert turn == 0 or cache.stats().miss_tokens == computed  # it went on where it was: nothing was looked up
        ids = torch.cat([out, prompts(2, 3, 0, seed=turn)], dim=1)
    del kept
    check_idle(cache)
    proven(TABLE, family, "continued")


@each_family
def test_small_pool(family: str) -> None:
    model, cache = attached(family, size=28)
    for seed in range(4):
        ids = prompts(2, 30, 7, seed=seed)
        plain = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(
            model.generate(ids, max_new_tokens=5, do_sample=False, past_key_values=HFCache(cache)), plain
        )
    assert cache.stats().evicted_blocks > 0
    with cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = prompts(3, 40, 0)  # has no room: computed as outside
        plain = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), plain)
    cache.core.check_valid()
    proven(TABLE, family, "small pool")
