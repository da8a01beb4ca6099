"""Models of PyTorch's own modules and of plain scaled_dot_product_attention, unchanged but for positions()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kvcache_core.errors import InvalidInput
from kvcache_core.testing import assert_cached_equals_recompute
from kvcache_torch import KVCache, generate, positions
from tests.supported import claimed, proven

VOCAB, WIDTH = 50, 16
TABLE = "PyTorch: own modules"
MODES = {"forward", "stepwise", "small pool"}


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.places = nn.Embedding(128, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def embed(self, ids: Tensor) -> Tensor:
        result: Tensor = self.tokens(ids) + self.places(positions(ids.shape[1], device=ids.device))
        return result


def hidden_later(length: int) -> Tensor:
    """The mask of nn.Transformer: -inf where a token would see a later one."""
    return nn.Transformer.generate_square_subsequent_mask(length)


class OwnAttention(Embedded):
    """nn.MultiheadAttention with a boolean mask; the batch is the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.MultiheadAttention(WIDTH, 4) for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(0, 1)
        mask = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        for layer in self.layers:
            x = x + layer(x, x, x, attn_mask=mask)[0]
        result: Tensor = self.head(x.transpose(0, 1))
        return result


class Encoder(Embedded):
    """nn.TransformerEncoder with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(self.embed(ids), mask=hidden_later(ids.shape[1]), is_causal=True))
        return result


class DotProduct(Embedded):
    """F.scaled_dot_product_attention called directly, grouped K/V heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.kv(x).chunk(2, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        result: Tensor = self.head(x + y.transpose(1, 2).flatten(2))
        return result


class Decoder(Embedded):
    """nn.TransformerDecoder with a memory."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, 4, 32, batch_first=True)
        self.body = nn.TransformerDecoder(layer, 2)

    def forward(self, ids: Tensor, memory: Tensor) -> Tensor:
        y = self.body(self.embed(ids), memory, tgt_mask=hidden_later(ids.shape[1]), tgt_is_causal=True)
        result: Tensor = self.head(y)
        return result


MODELS: dict[str, Callable[[], nn.Module]] = {
    "nn.MultiheadAttention": OwnAttention,
    "nn.TransformerEncoder": Encoder,
    "F.scaled_dot_product_attention": DotProduct,
}


def build(kind: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return kind().eval()


def test_the_table_claims_what_is_tested_here_and_no_more() -> None:
    mine = {(name, mode) for name in MODELS for mode in MODES}
    assert claimed(TABLE) == mine | {("nn.TransformerDecoder", mode) for mode in MODES}


@pytest.mark.parametrize("name", list(MODELS))
def test_equals_recompute(name: str) -> None:
    model, cache = build(MODELS[name]), KVCache(size=512, block_size=4)
    assert_cached_equals_recompute(model, cache, max_length=24, rounds=3)
    proven(TABLE, name, "forward")
    proven(TABLE, name, "stepwise")


@pytest.mark.parametrize("name", list(MODELS))
def test_small_pool(name: str) -> None:
    model, cache = build(MODELS[name]), KVCache(size=12, block_size=4)
    for seed in range(4):
        prompts = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(seed)).tolist()
        assert generate(model, prompts, max_new_tokens=8, cache=cache) == generate(model, prompts, max_new_tokens=8)
    assert cache.stats().evicted_blocks > 0
    proven(TABLE, name, "small pool")


def test_a_decoder_with_memory() -> None:
    model, cache = build(Decoder), KVCache(size=256, block_size=4)
    cache.attach(model)
    memory = torch.randn(3, 7, WIDTH)
    ids = torch.randint(0, VOCAB, (3, 20))
    with torch.no_grad():
        for length in (5, 6, 13, 20, 20):  # as a decoding loop calls it: with all tokens so far
            plain = model(ids[:, :length], memory)
            with cache:
                assert torch.allclose(model(ids[:, :length], memory), plain, atol=1e-5)
        assert cache.stats().hit_tokens == 3 * (5 + 6 + 13 + 19)
        assert cache.stats().bypassed_calls == 0
        assert len(cache._driver.memories) == 2  # one K and V per layer, computed once
        with cache:  # another memory: nothing is found, and nothing is mixed up
            other = torch.randn(3, 7, WIDTH)
            cached = model(ids, other)
            swapped = model(ids[[1, 0]], memory[[1, 0]])
        assert torch.allclose(cached, model(ids, other), atol=1e-5)
        assert torch.allclose(swapped, model(ids[[1, 0]], memory[[1, 0]]), atol=1e-5)
        assert cache.stats().hit_tokens == 3 * (5 + 6 + 13 + 19) + 2 * 19  # rows are found by their own memory
    cache.core.check_valid()
    proven(TABLE, "nn.TransformerDecoder", "forward")


@settings(max_examples=25)
@given(
    calls=st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(1, 20)), min_size=1, max_size=3),
        min_size=1,
        max_size=6,
    )
)
def test_any_calls_of_a_decoder_with_memory(calls: list[list[tuple[int, int, int]]]) -> None:
    """Batches of (prompt, memory, length): ragged rows that go on with, or begin like, earlier ones."""
    model, cache = build(Decoder), KVCache(size=64, block_size=4)
    cache.attach(model)
    random = torch.Generator().manual_seed(0)
    memories = torch.randn(2, 7, WIDTH, generator=random)
    prompts = torch.randint(0, VOCAB, (3, 20), generator=random)
    prompts[1, :9] = prompts[0, :9]
    with torch.no_grad():
        for rows in calls:
            which, memory, lengths = (torch.tensor(column) for column in zip(*rows, strict=True))
            ids = prompts[which, : int(lengths.max())]
            with cache:
                cached = model(ids, memories[memory], lengths=lengths)
            for row, length in enumerate(lengths.tolist()):
                alone = model(ids[row : row + 1, :length], memories[memory[row : row + 1]])[0]
                error = (cached[row, :length] - alone).abs().max()
                assert error <= 32 * torch.finfo(torch.float32).eps * alone.abs().max()
    assert cache.stats().bypassed_calls == 0
    cache.core.check_valid()
    proven(TABLE, "nn.TransformerDecoder", "stepwise")


def test_a_decoder_with_memory_in_a_small_pool() -> None:
    """Random lengths over two memories; what was evicted is computed again."""
    model, cache = build(Decoder), KVCache(size=18, block_size=4)
    cache.attach(model)
    random = torch.Generator().manual_seed(0)
    memories = torch.randn(2, 2, 7, WIDTH, generator=random)
    prompts = torch.randint(0, VOCAB, (3, 2, 24), generator=random)
    with torch.no_grad():
        for _ in range(24):
            which, prompt, length = (int(torch.randint(0, most, (), generator=random)) for most in (2, 3, 24))
            ids, memory = prompts[prompt, :, : length + 1], memories[which]
            plain = model(ids, memory)
            with cache:
                assert torch.allclose(model(ids, memory), plain, atol=1e-5)
            cache.core.check_valid()
    assert cache.stats().evicted_blocks > 0
    assert cache.stats().hit_tokens > 0
    assert cache.stats().bypassed_calls == 0
    proven(TABLE, "nn.TransformerDecoder", "small pool")


def test_attaching_again_goes_on_with_what_is_cached() -> None:
    model, cache = build(Encoder), KVCache(size=64, block_size=4)
    ids = torch.randint(0, VOCAB, (1, 12))
    cache.attach(model)
    with torch.no_grad(), cache:
        first = model(ids)
    cache.detach()
    assert "forward" not in vars(model)
    cache.attach(model)
    with torch.no_grad(), cache:
        assert torch.allclose(model(ids), first, atol=1e-6)
    assert cache.stats().hit_tokens == 11


class Wrong(DotProduct):
    def __init__(self, options: Callable[[int], dict[str, Any]]) -> None:
        super().__init__()
        self.options = options

    def forward(self, ids: Tensor) -> Tensor:
        q = self.q(self.embed(ids)).unflatten(-1, (4, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q, **self.options(ids.shape[1]))
        result: Tensor = self.head(y.transpose(1, 2).flatten(2))
        return result


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (lambda length: {"attn_mask": torch.ones(length, length, dtype=torch.bool)}, "not the causal one"),
        (lambda length: {"attn_mask": hidden_later(length) - 0.5 * torch.eye(length)}, "not the causal one"),
        (lambda length: {"attn_mask": hidden_later(length) * 0}, "not the causal one"),
    ],
)
def test_masks_that_cannot_be_honoured_are_refused(options: Any, reason: str) -> None:
    cache = KVCache(size=64, block_size=4)
    model = cache.attach(build(lambda: Wrong(options)))
    with pytest.raises(InvalidInput, match=reason), cache:
        model(torch.zeros(1, 5, dtype=torch.int64))


def test_without_a_causal_mask_it_is_an_encoder_and_kept_per_sample() -> None:
    cache = KVCache(size=64, block_size=4)
    model = cache.attach(build(lambda: Wrong(lambda length: {})))
    ids = torch.arange(5)[None]
    with torch.no_grad():
        plain = model(ids)
        with cache:
            assert torch.equal(model(ids), plain)
            assert torch.equal(model(ids), plain)
    assert cache.stats().hit_entries == 1


def test_a_window_is_refused_when_it_shows() -> None:
    def window(length: int) -> dict[str, Any]:
        steps = torch.arange(length)
        return {"attn_mask": (steps[None] <= steps[:, None]) & (steps[None] > steps[:, None] - 3)}

    cache = KVCache(size=64, block_size=4)
    model = cache.attach(build(lambda: Wrong(window)))
    with torch.no_grad(), cache, pytest.raises(InvalidInput, match="not the causal one"):
        model(torch.zeros(1, 8, dtype=torch.int64))
    cache.core.check_valid()


def test_a_padding_mask_of_the_models_own_is_refused() -> None:
    class Padded(Encoder):
        def forward(self, ids: Tensor) -> Tensor:
            padding = torch.zeros(ids.shape).masked_fill(ids == 0, -torch.inf)
            x = self.body(self.embed(ids), mask=hidden_later(ids.shape[1]), src_key_padding_mask=padding)
            result: Tensor = self.head(x)
            return result

    cache = KVCache(size=64, block_size=4)
    model = cache.attach(build(Padded))
    with torch.no_grad(), pytest.raises(InvalidInput, match="key_padding_mask"), cache:
        model(torch.tensor([[3, 4, 0]]))
