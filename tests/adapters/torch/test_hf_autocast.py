"""transformers models under autocast: the cache keeps what the model gives there, and nothing else finds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvcache_core import BlockRefused, InvalidType
from kvcache_torch import KVCache, attention, generate
from kvcache_torch.hf import HFCache
from tests.adapters.torch.hf_models import DECODERS, VOCAB, decoder, encoder_decoder

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")

autocast = torch.autocast("cpu", torch.bfloat16)
ULP = 2**-7


def ids(rows: int = 2, length: int = 19) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def attached(model: Any, **options: Any) -> KVCache:
    cache = KVCache(size=256, block_size=4, **options)
    cache.attach(model)
    return cache


def reference(model: Any, plain: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, float]:
    """The result in float32, and how far from it a cached one may be: 1.5 times the uncached one, and one unit."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        wide = model(*args, **kwargs).logits
    own = (plain.float() - wide).abs().max()
    return wide, 1.5 * own.item() + ULP * plain.abs().max().item()


@pytest.mark.parametrize("family", list(DECODERS))
def test_every_family_as_outside(family: str) -> None:
    """Rotated K in float32 beside V in bfloat16 (most), and families that get K and V returned (BLOOM, Falcon ...)."""
    model, x = decoder(family), ids()
    cache = attached(model)
    with torch.no_grad(), autocast:
        plain = model(x).logits
        wide, limit = reference(model, plain, x)
        for _ in range(2):
            with cache:
                cached = model(x).logits
            assert cached.dtype == plain.dtype
            assert (cached.float() - wide).abs().max() <= limit
        assert cache.stats().hit_tokens == x.numel() - len(x)
        new = model.generate(x, max_new_tokens=5, do_sample=False, past_key_values=HFCache(cache))
        logits = model(new).logits[:, x.shape[1] - 1 : -1].float()
    chosen = logits.gather(2, new[:, x.shape[1] :, None])[..., 0]
    assert (logits.amax(dim=2) - chosen).max() <= 4 * limit  # both sides are off by up to two limits
    assert cache.stats().bypassed_calls == 0
    cache.core.check_valid()


@pytest.mark.parametrize("family", ["T5", "BART"])
def test_encoder_decoders_as_outside(family: str) -> None:
    model, x = encoder_decoder(family), ids()
    cache = attached(model)
    with torch.no_grad(), autocast:
        plain = model(x, decoder_input_ids=x).logits
        wide, limit = reference(model, plain, x, decoder_input_ids=x)
        for _ in range(2):
            with cache:
                cached = model(x, decoder_input_ids=x).logits
            assert (cached.float() - wide).abs().max() <= limit
    assert cache.stats().hit_tokens == x.numel() - len(x)


def test_generate_under_autocast() -> None:
    model, x = decoder("Llama"), ids()
    cache = attached(model)
    with autocast:
        first = generate(model, x.tolist(), max_new_tokens=5, cache=cache)
        assert generate(model, x.tolist(), max_new_tokens=5, cache=cache) == first
    assert cache.spec is not None
    assert cache.spec.dtype == "bfloat16"


def test_a_model_of_ones_own_with_k_in_float32() -> None:
    class Rotating(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = torch.nn.Embedding(VOCAB, 32), torch.nn.Linear(32, VOCAB)
            self.project = torch.nn.Linear(32, 96)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (part.unflatten(2, (4, 8)).transpose(1, 2) for part in self.project(self.embed(x)).chunk(3, 2))
            two = torch.tensor(2.0).expand(8)  # float32 times bfloat16: float32, as a rotation gives
            result: torch.Tensor = self.out(attention(q * two, k * two, v, layer=0).transpose(1, 2).flatten(2))
            return result

    torch.manual_seed(0)
    model, x = Rotating().eval(), ids()
    cache = attached(model)
    with torch.no_grad(), autocast:
        plain = model(x)
        with cache:
            for _ in range(2):
                assert torch.allclose(model(x), plain, atol=ULP * plain.abs().max().item())
    assert cache.stats().hit_tokens == x.numel() - len(x)


@pytest.mark.parametrize("family", ["Falcon", "OPT"])
def test_nothing_is_found_across_the_two_ways_of_computing(family: str, tmp_path: Path) -> None:
    """Falcon's K and V are stored in float32 either way; OPT's weights, and so its K and V, are bfloat16 here."""
    model = decoder(family) if family == "Falcon" else decoder(family).bfloat16()
    x = ids()
    cache = attached(model)
    with torch.no_grad():
        plain = model(x).logits
        with autocast, cache:
            model(x)
        with cache:
            assert torch.equal(model(x).logits, plain)
        assert cache.stats().hit_tokens == 0
        with autocast, cache:
            model(x)
        assert cache.stats().hit_tokens == x.numel() - len(x)
        with autocast:
            cache.save(tmp_path / "cache")
    cache.detach()
    loaded = KVCache.load(tmp_path / "cache")
    loaded.attach(model)
    with pytest.raises(BlockRefused, match="weights"), torch.no_grad(), loaded:
        model(x)


def test_another_dtype_of_k_and_v_is_refused_clearly() -> None:
    model, x = decoder("Llama"), ids()
    cache = attached(model)
    with torch.no_grad():
        with autocast, cache:
            model(x)
        with cache, pytest.raises(InvalidType, match=r"must be torch.bfloat16 .* make a new cache for another dtype"):
            model(x)
    cache.core.check_valid()
