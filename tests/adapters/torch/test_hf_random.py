"""Random programs over one HFCache: steps of any width, crops, reordered rows, padding; against recompute."""

from __future__ import annotations

from functools import cache as remember
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache_torch import KVCache
from kvcache_torch.hf import HFCache
from tests.adapters.torch.hf_models import VOCAB, decoder

FAMILIES = ("Llama", "Gemma 2", "GPT-2", "BLOOM")


@remember
def attached(family: str) -> tuple[Any, KVCache]:
    model = decoder(family)
    cache = KVCache(size=60, block_size=4)
    cache.attach(model)
    return model, cache


operations = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 7)),
    st.tuples(st.just("crop"), st.integers(0, 6)),
    st.tuples(st.just("rows"), st.lists(st.integers(0, 2), min_size=1, max_size=3)),
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15)
@given(
    seed=st.integers(0, 5),
    padding=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    program=st.lists(operations, min_size=1, max_size=6),
)
def test_any_program_equals_recompute(
    family: str, seed: int, padding: list[int], program: list[tuple[str, Any]]
) -> None:
    model, cache = attached(family)
    random = torch.Generator().manual_seed(seed)
    past = HFCache(cache)
    ids = torch.zeros(len(padding), 0, dtype=torch.int64)
    mask = ids.clone()

    def step(new_mask: torch.Tensor) -> None:
        nonlocal ids, mask
        width = new_mask.shape[1]
        new = torch.randint(1, 4 if seed % 2 else VOCAB, (len(ids), width), generator=random)
        ids, mask = torch.cat([ids, new], dim=1), torch.cat([mask, new_mask], dim=1)
        where = (mask.cumsum(dim=1) - 1).clip(min=0)
        more = {} if family == "BLOOM" else {"position_ids": where}
        latest = {name: value[:, -width:] for name, value in more.items()}
        with torch.no_grad():
            cached = model(new, attention_mask=mask, cache=past, **latest).logits
            plain = model(ids, attention_mask=mask, **more).logits[:, -width:]
        there = new_mask.bool()
        error = (cached - plain)[there].abs().max()
        assert error <= 64 * torch.finfo(torch.float32).eps * plain[there].abs().max()

    left = torch.arange(8)[None] >= torch.tensor(padding)[:, None]
    step(left.long())
    for what, value in program:
        if what == "step":
            step(torch.ones(len(ids), value, dtype=torch.int64))
        elif what == "crop":
            kept = max(4, ids.shape[1] - value)  # 3 columns at most are padding
            past.crop(kept - ids.shape[1])
            ids, mask = ids[:, :kept], mask[:, :kept]
        else:
            at = torch.tensor([index % len(ids) for index in value])
            past.batch_select_indices(at)
            ids, mask = ids[at], mask[at]
    past.reset()
    cache.core.check_valid()
    assert cache.stats().open_sequences == 0


def test_one_row_known_and_one_new():
    """The step is as wide as the call, for the new row's sake; the known row computes its last token alone."""
    model = decoder("Llama")
    cache = KVCache(size=60, block_size=4)
    cache.attach(model)
    ids = torch.randint(1, VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(ids).logits
        with cache:
            model(ids[:1])
            both = model(ids).logits
    assert cache.stats().hit_tokens == 7
    assert (both - plain).abs().max() <= 64 * torch.finfo(torch.float32).eps * plain.abs().max()
