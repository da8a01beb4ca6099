"""One limit in bytes for an encoder's activations and a decoder's K/V in one cache."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kvcache_torch
from kvcache_core import CacheFull
from kvcache_torch import KVCache, generate
from tests.adapters.torch.models import Small, close, ids, prompt
from tests.adapters.two_kinds import BLOCK_SIZE, ENTRY, TwoKinds


class Encoder(nn.Module):
    """A small encoder: [B, 16] -> [B, 8, 32], 1,024 bytes a sample; counts the samples it computes."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8 * 32)
        self.rows = 0

    def forward(self, x):
        self.rows += len(x)
        return self.second(torch.tanh(self.first(x))).unflatten(-1, (8, 32))


def samples(seed: int, count: int = 4):
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


class Both(TwoKinds):
    """An encoder and a decoder over one cache of ``blocks`` blocks."""

    def __init__(self, blocks: int = 64, *, outputs: str = "last", **options) -> None:
        super().__init__(kvcache_torch, Encoder().eval(), Small(), blocks, outputs, **options)

    def array_bytes(self) -> int:
        return sum(array.nbytes for array in self.cache.store._arrays.values())

    @torch.inference_mode()
    def encode(self, x) -> None:
        """Encode inside the cache; the answer is that of outside."""
        with self.cache:
            found = self.encoder(x)
        counted = self.encoder.rows
        close(found, self.encoder(x))
        self.encoder.rows = counted
        self.check()


def test_memory_moves_to_the_kind_that_is_in_use():
    both = Both()
    for number in range(8):
        both.generate([prompt(number, 30)])
    assert both.cache.core.num_blocks == 64
    assert both.cache.stats().memory_moves == 0
    for number in range(40):
        both.encode(samples(number))
    few = both.cache.core.num_blocks
    assert few <= 2 * 64 // 16
    stats = both.cache.stats()
    assert stats.entry_bytes == stats.entries * ENTRY > 0.8 * both.memory
    before = both.encoder.rows
    both.encode(samples(39))
    assert both.encoder.rows == before, "the newest are kept"
    for number in range(8):
        both.generate([prompt(number, 30)])
    assert both.cache.core.num_blocks > 64 / 2
    assert both.cache.stats().memory_moves <= 2 * 16 + 2


def test_the_encoder_first():
    both = Both()
    cache = both.begin_with_the_encoder()
    with torch.inference_mode(), cache:
        both.encoder(samples(0, 100))
    assert cache.stats().entry_bytes == both.memory // ENTRY * ENTRY, "all of it"
    cache.attach(both.decoder, kind="tokens", outputs="last")
    both.generate([prompt(0, 60)])
    both.generate([prompt(0, 60)])
    assert cache.stats().hit_tokens > 0
    both.encode(samples(1))
    cache.detach(both.decoder)
    cache.attach(both.decoder, outputs="last")
    both.generate([prompt(0, 60)])


def test_old_content_of_the_idle_kind_goes_and_new_content_of_the_same_kind_stays():
    both = Both()
    both.generate([prompt(0, 100)], count=1)
    both.generate([prompt(1, 40)], count=1)
    both.encode(samples(0, 44))
    core, salt = both.cache.core, both.cache.salt
    assert core.cached_length(prompt(0, 100), salt) < 100 - BLOCK_SIZE
    assert core.cached_length(prompt(1, 40), salt) >= 36
    assert both.cache.stats().evicted_entries == 0


def test_an_open_sequence_goes_on_while_memory_moves():
    both = Both()
    row = prompt(5, 90)
    with torch.inference_mode():
        plain = both.decoder(torch.tensor([row]))[0]
    both.cache.warm([prompt(1, 60)])
    seq = both.cache.open(row)
    both.cache.step([seq], [row[:20]])
    for at in range(20, 90):
        if at % 10 == 0:
            both.encode(samples(at, 16))
        close(torch.from_numpy(both.cache.step([seq], [row[at : at + 1]]))[0], plain[at])
    assert both.cache.stats().memory_moves > 0
    seq.close()


def test_what_fits_only_without_activations_is_served():
    both = Both()
    both.encode(samples(0, 60))
    assert both.cache.core.num_blocks < 50
    both.generate([prompt(0, 60), prompt(1, 60), prompt(2, 60)], count=4)
    with pytest.raises(CacheFull, match="the whole cache has 64"):
        generate(both.decoder, [prompt(0, 300)], max_new_tokens=2, cache=both.cache)


def test_a_decoder_that_calls_the_encoder_in_its_step():
    """Nothing moves under a step: the encoder's results then go in its own share."""

    class Reads(Small):
        def __init__(self, encoder) -> None:
            super().__init__()
            self.encoder, self.into = encoder, nn.Linear(8 * 32, 24)

        def where(self, x):
            seen = self.into(self.encoder(torch.ones(1, 16)).flatten(1))
            return super().where(x) + seen[:, None]

    encoder = Encoder().eval()
    model = Reads(encoder).eval()
    cache = KVCache(memory="200KB", block_size=BLOCK_SIZE)
    cache.attach(model, kind="tokens")
    cache.attach(encoder, kind="activation")
    x = ids(0, 2, 30)
    with torch.inference_mode():
        plain = model(x)
        with cache:
            close(model(x), plain)
            close(model(x), plain)
    cache._budget.check_valid()
    assert cache.stats().memory_moves == 0


def test_a_resize_without_memory_changes_nothing():
    both = Both()
    row = prompt(5, 24)
    with torch.inference_mode():
        plain = both.decoder(torch.tensor([row]))[0]
    both.resize_without_memory(row, lambda found, at: close(torch.from_numpy(found), plain[at]), prompt, samples)


def test_memory_that_cannot_move_stays_where_it_is():
    Both().memory_cannot_move(prompt, samples)


def test_resize_keeps_the_one_limit():
    both = Both()
    both.generate([prompt(0, 60)])
    both.encode(samples(0, 16))
    both.memory = 30 * both.block
    both.cache.resize(memory=both.memory)
    both.check()
    both.encode(samples(0, 16))
    both.generate([prompt(0, 60)])
    both.cache.resize(20)
    assert (both.cache.core.num_blocks, both.cache.sites.entries.size) == (20, 20)
    both.cache.resize(memory=both.memory)
    both.generate([prompt(1, 60)])
    both.encode(samples(1, 16))


def test_size_counts_each_kind_for_itself():
    both = Both()
    cache = KVCache(size=20, block_size=BLOCK_SIZE)
    for model in (both.decoder, both.encoder):
        both.cache.detach(model)
    cache.attach(both.decoder, kind="tokens")
    cache.attach(both.encoder, kind="activation")
    with torch.inference_mode(), cache:
        both.encoder(samples(0, 30))
    cache.warm([prompt(0, 70)])
    assert (cache.stats().entries, cache.core.num_blocks, cache.stats().memory_moves) == (20, 20, 0)


def test_another_model_gets_what_activations_leave():
    both = Both()
    both.generate([prompt(0, 30)])
    both.encode(samples(0, 16))
    both.cache.detach(both.decoder)
    both.cache.detach(both.encoder)
    both.decoder = Small(seed=1, width=32)
    both.cache.attach(both.decoder, kind="tokens", outputs="last")
    both.cache.attach(both.encoder, kind="activation")
    assert both.cache.sites.entries.memory == both.memory
    both.generate([prompt(0, 30)])
    rows = both.encoder.rows
    both.encode(samples(0, 16))
    assert both.encoder.rows == rows


def test_a_decode_loop_makes_no_new_arrays():
    """A model whose only kind is K/V keeps the arrays that it began with."""
    both = Both()
    both.generate([prompt(0, 30)])
    arrays = [array.data_ptr() for array in both.cache.store._arrays.values()]
    for number in range(1, 12):
        both.generate([prompt(number, 40), prompt(number, 20)])
    assert both.cache.stats().evicted_blocks > 0
    assert [array.data_ptr() for array in both.cache.store._arrays.values()] == arrays


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("encode"), st.integers(0, 30), st.integers(1, 24)),
            st.tuples(st.just("generate"), st.integers(0, 8), st.integers(1, 60)),
            st.tuples(st.just("call"), st.integers(0, 8), st.integers(1, 60)),
        ),
        min_size=4,
        max_size=12,
    )
)
@settings(max_examples=10)
def test_any_order_of_uses(uses):
    both = Both(blocks=40, outputs="all")
    for what, seed, size in uses:
        if what == "encode":
            both.encode(samples(seed, size))
        elif what == "generate":
            both.generate([prompt(seed, size)], count=2)
        else:
            x = torch.tensor([prompt(seed, size)])
            with torch.inference_mode():
                plain = both.decoder(x)
                with both.cache:
                    close(both.decoder(x), plain)
            both.check()


def test_threads_that_use_both_kinds_at_once():
    both = Both(blocks=40)
    prompts = [[prompt(10 * turn + row, 25) for row in range(2)] for turn in range(12)]
    plain = [generate(both.decoder, rows, max_new_tokens=4) for rows in prompts]
    with torch.inference_mode():
        encoded = [both.encoder(samples(seed, 6)) for seed in range(40)]
    start = threading.Barrier(3)

    def encode(first):
        start.wait()
        for seed in range(first, 40):
            with torch.inference_mode(), both.cache:
                close(both.encoder(samples(seed, 6)), encoded[seed])
            assert both.cache.stats().bytes <= both.memory

    def decode():
        start.wait()
        for rows, expected in zip(prompts, plain, strict=True):
            assert generate(both.decoder, rows, max_new_tokens=4, cache=both.cache) == expected

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(encode, 0), pool.submit(encode, 20), pool.submit(decode)]:
            done.result()
    both.check()
    stats = both.cache.stats()
    assert stats.memory_moves > 0, "between two steps, though an entry hardly ever comes then"
    assert stats.live_blocks == 0


def test_what_a_move_gives_up_goes_down_a_tier_and_comes_back():
    both = Both(tiers=["ram:10MB"], promote="always")
    both.generate([prompt(0, 100)])
    both.encode(samples(0, 60))
    assert both.cache.stats().evicted_blocks > 0
    both.generate([prompt(0, 100)])
    stats = both.cache.stats()
    assert stats.promoted_blocks > 0
    assert stats.evicted_entries > 0
    assert both.cache.flush(10)
    computed = both.encoder.rows
    both.encode(samples(0, 60)[:20])
    assert both.encoder.rows == computed
