"""Every encoder-decoder family of transformers: with the cache as without it; K/V of an input computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvcache_torch import KVCache
from kvcache_torch.hf import HFCache
from tests.adapters.torch.hf_models import ENCODER_DECODERS, VOCAB, encoder_decoder
from tests.supported import claimed, proven

TABLE = "PyTorch: transformers, encoder-decoder"
FAMILIES = list(ENCODER_DECODERS)
each_family = pytest.mark.parametrize("family", FAMILIES)
MODES = {"forward", "greedy", "sampling", "beam search", "several sequences", "assisted", "small pool"}

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")


def inputs(family: str, rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    if family == "Whisper":
        return {"input_features": torch.randn(rows, 6, 24, generator=random)}
    ids = torch.randint(2, VOCAB, (rows, 11), generator=random)
    mask = torch.ones_like(ids)
    mask[rows // 2, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def attached(family: str, size: int = 256) -> tuple[Any, KVCache]:
    model = encoder_decoder(family)
    cache = KVCache(size=size, block_size=4)
    cache.attach(model)
    return model, cache


def test_the_table_claims_what_is_tested_here_and_no_more() -> None:
    assert claimed(TABLE) == {(family, mode) for family in FAMILIES for mode in MODES}


@each_family
def test_forward(family: str) -> None:
    model, cache = attached(family)
    x, random = inputs(family), torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (3, 13), generator=random)
    with torch.no_grad():
        plain = model(**x, decoder_input_ids=ids).logits
        with cache:
            for length in (4, 9, 13, 13):  # nothing, a part and all of it cached
                cached = model(**x, decoder_input_ids=ids[:, :length]).logits
                difference = (cached - plain[:, :length]).abs().max()
                assert difference <= 64 * torch.finfo(torch.float32).eps * plain.abs().max()
    assert cache.stats().hit_tokens == 3 * (4 + 9 + 12)
    assert cache.stats().bypassed_calls == 0
    cache.core.check_valid()
    proven(TABLE, family, "forward")


@each_family
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("greedy", {"do_sample": False}),
        ("sampling", {"do_sample": True, "top_k": 20}),
        ("beam search", {"do_sample": False, "num_beams": 3, "num_return_sequences": 2}),
        ("several sequences", {"do_sample": True, "num_return_sequences": 3}),
    ],
)
def test_generate(family: str, mode: str, options: dict[str, Any]) -> None:
    model, cache = attached(family)
    x = inputs(family)

    def generate(**more: Any) -> torch.Tensor:
        torch.manual_seed(4)
        result: torch.Tensor = model.generate(**x, max_new_tokens=7, **options, **more)
        return result

    plain = generate()
    for _ in range(2):
        assert torch.equal(generate(past_key_values=HFCache(cache)), plain)
    with cache:
        assert torch.equal(generate(), plain)
    assert cache.stats().bypassed_calls == 0
    assert cache._driver.cross.computed == 3  # once per input, whatever ran over it
    assert cache.stats().open_sequences == 0
    proven(TABLE, family, mode)


@each_family
def test_assisted(family: str) -> None:
    model, cache = attached(family)
    x, helper = inputs(family, rows=1), encoder_decoder(family, seed=1)
    plain = model.generate(**x, max_new_tokens=8, do_sample=False)
    out = model.generate(**x, max_new_tokens=8, do_sample=False, assistant_model=helper, past_key_values=HFCache(cache))
    assert torch.equal(out, plain)
    with torch.inference_mode(), cache:
        assert torch.equal(model.generate(**x, max_new_tokens=8, do_sample=False), plain)
    proven(TABLE, family, "assisted")


@each_family
def test_small_pool(family: str) -> None:
    model, cache = attached(family, size=8)
    for seed in range(4):
        x = inputs(family, rows=2, seed=seed)
        plain = model.generate(**x, max_new_tokens=9, do_sample=False)
        assert torch.equal(
            model.generate(**x, max_new_tokens=9, do_sample=False, past_key_values=HFCache(cache)), plain
        )
    assert cache.stats().evicted_blocks > 0
    cache.core.check_valid()
    proven(TABLE, family, "small pool")


def test_equal_tokens_over_another_input_are_not_mixed_up() -> None:
    model, cache = attached("BART")
    one, other = inputs("BART", seed=1), inputs("BART", seed=2)
    ids = torch.full((3, 6), 5)
    with torch.no_grad(), cache:
        first = model(**one, decoder_input_ids=ids).logits
        hits = cache.stats().hit_tokens
        second = model(**other, decoder_input_ids=ids).logits
        assert cache.stats().hit_tokens == hits
    assert not torch.allclose(first, second, atol=1e-3)
