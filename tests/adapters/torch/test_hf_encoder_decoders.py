"""Every encoder-decoder family of transformers: with the cache as without it; K/V of an input computed once."""

from __future__ import annotations

from functools import cache as remember
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_outputs import BaseModelOutput

from kvcache_torch import KVCache
from kvcache_torch.hf import HFCache
from tests.adapters.torch.hf_models import ENCODER_DECODERS, VOCAB, encoder_decoder
from tests.supported import claimed, proven

TABLE = "PyTorch: transformers, encoder-decoder"
FAMILIES = list(ENCODER_DECODERS)
each_family = pytest.mark.parametrize("family", FAMILIES)
MODES = {
    *("forward", "stepwise", "greedy", "sampling", "padding", "beam search", "several sequences", "assisted"),
    *("continued", "small pool"),
}
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}

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


operations = st.one_of(
    st.tuples(st.just("step"), st.lists(st.integers(1, 6), min_size=3, max_size=3)),
    st.tuples(st.just("crop"), st.integers(0, 5)),
    st.tuples(st.just("rows"), st.lists(st.integers(0, 2), min_size=1, max_size=3)),
)


@each_family
@settings(max_examples=12)
@given(seed=st.integers(0, 5), program=st.lists(operations, min_size=1, max_size=6))
def test_any_program_equals_recompute(family: str, seed: int, program: list[tuple[str, Any]]) -> None:
    """Steps over ragged rows, crops and chosen rows over one HFCache; each row against itself alone, in full."""
    model, cache = remembered(family)
    random, past = torch.Generator().manual_seed(seed), HFCache(cache)
    with torch.no_grad():
        encoded = model.get_encoder()(**inputs(family, seed=seed % 2)).last_hidden_state
    hidden, ids, mask = encoded, torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, 0, dtype=torch.int64)
    for what, value in [("step", [3, 1, 2]), *program, ("step", [1, 1, 1])]:
        if what == "step":
            new_mask = (torch.arange(max(value))[None] < torch.tensor(value)[: len(ids), None]).long()
            new = torch.randint(1, 4 if seed % 2 else VOCAB, new_mask.shape, generator=random)
            ids, mask = torch.cat([ids, new], dim=1), torch.cat([mask, new_mask], dim=1)
            with torch.no_grad():
                cached = model(
                    encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
                    decoder_input_ids=new,
                    decoder_attention_mask=mask,
                    past_key_values=past,
                ).logits
            for row, there in enumerate(new_mask.bool()):
                expected = alone(model, hidden[row], ids[row][mask[row].bool()])[-int(there.sum()) :]
                error = (cached[row][there] - expected).abs().max()
                assert error <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()
        elif what == "crop":
            kept = max(3, ids.shape[1] - value)  # every row has a token in the first three columns
            past.crop(kept - ids.shape[1])
            ids, mask = ids[:, :kept], mask[:, :kept]
        else:
            at = torch.tensor([index % len(ids) for index in value])
            past.batch_select_indices(at)
            hidden, ids, mask = hidden[at], ids[at], mask[at]
    past.reset()
    cache.core.check_valid()
    assert cache.stats().open_sequences == 0 == cache.stats().bypassed_calls
    proven(TABLE, family, "stepwise")
    proven(TABLE, family, "padding")


@remember
def remembered(family: str) -> tuple[Any, KVCache]:
    return attached(family, size=60)


def alone(model: Any, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """A row's logits, [T, V], computed in full."""
    with torch.no_grad():
        read = BaseModelOutput(last_hidden_state=hidden[None])
        result: torch.Tensor = model(encoder_outputs=read, decoder_input_ids=tokens[None]).logits[0]
    return result


@each_family
def test_continued(family: str) -> None:
    """A kept cache goes on behind what was generated: the next turn's tokens alone are computed."""
    model, cache = attached(family)
    x, kept, random = inputs(family), HFCache(cache), torch.Generator().manual_seed(2)
    ids = torch.ones(3, 1, dtype=torch.int64)  # the start token
    for turn in range(3):
        ids = torch.cat([ids, torch.randint(1, VOCAB, (3, 4), generator=random)], dim=1)
        # By the mask transformers knows that the tokens are the whole rows, and passes on what the past does not hold.
        options = {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids), **GREEDY}
        plain = model.generate(**x, **options)
        computed = cache.stats().miss_tokens
        out = model.generate(**x, **options, past_key_values=kept)
        assert torch.equal(out, plain)
        assert turn == 0 or cache.stats().miss_tokens == computed  # it went on where it was: nothing was looked up
        ids = torch.cat([ids, out[:, -4:]], dim=1)  # Whisper gives the new tokens alone
    assert cache._driver.cross.computed == 3
    del kept
    cache.core.check_valid()
    assert cache.stats().open_sequences == 0
    proven(TABLE, family, "continued")
