"""An encoder's activations and a decoder's K/V in one cache, for either framework."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from kvcache_core import OutOfMemory
from tests.no_memory import no_memory

BLOCK_SIZE = 4
ENTRY = 8 * 32 * 4
"""Bytes of a sample's result: the encoders make [B, 8, 32] of [B, 16]."""


class TwoKinds:
    """Both models over one cache of ``blocks`` blocks.

    Args:
        kvcache: ``kvcache_torch`` or ``kvcache_keras``.
        encoder: attached with ``kind="activation"``.
        decoder: attached with ``kind="tokens"``.
        blocks: what the limit in bytes holds beside the null block.
        outputs: of the decoder.
        options: of the cache.
    """

    def __init__(
        self, kvcache: ModuleType, encoder: Any, decoder: Any, blocks: int, outputs: str, **options: Any
    ) -> None:
        self.kvcache, self.encoder, self.decoder = kvcache, encoder, decoder
        probe = kvcache.KVCache(4, block_size=BLOCK_SIZE)
        probe.attach(decoder, outputs=outputs)
        self.block = probe.core.layout.bytes_per_block
        probe.detach()
        self.memory = (blocks + 1) * self.block
        self.cache = kvcache.KVCache(memory=self.memory, block_size=BLOCK_SIZE, **options)
        self.cache.attach(decoder, kind="tokens", outputs=outputs)
        self.cache.attach(encoder, kind="activation")

    def begin_with_the_encoder(self) -> Any:
        """Another cache, with nothing attached but the encoder; returns it."""
        for model in (self.decoder, self.encoder):
            self.cache.detach(model)
        self.cache = self.kvcache.KVCache(memory=self.memory, block_size=BLOCK_SIZE)
        self.cache.attach(self.encoder, kind="activation")
        return self.cache

    def generate(self, prompts: list[list[int]], count: int = 3) -> None:
        """Generate with the cache; the answer is that of without."""
        found = self.kvcache.generate(self.decoder, prompts, max_new_tokens=count, cache=self.cache)
        assert found == self.kvcache.generate(self.decoder, prompts, max_new_tokens=count)
        self.check()

    def resize_in_vain(self, size: str | int) -> None:
        """A resize changes nothing, whichever of the new arrays finds no memory."""
        before = self.cache.stats()
        for at in range(len(self.cache.store._arrays)):
            with no_memory(self.cache.store, at), pytest.raises(OutOfMemory, match="free memory first"):
                self.cache.resize(size)
            self.check()
            assert self.cache.stats() == before

    def memory_cannot_move(self, prompt: Callable[..., list[int]], samples: Callable[..., Any]) -> None:
        """Without memory for other arrays the division stays as it is; later it is tried again."""
        self.generate([prompt(0, 60)])
        blocks = self.cache.core.num_blocks
        with no_memory(self.cache.store, 1):
            for number in range(4):
                self.encode(samples(number, 8))
                self.generate([prompt(number, 60)])
        stats = self.cache.stats()
        assert (self.cache.core.num_blocks, stats.memory_moves, stats.failed_memory_moves > 0) == (blocks, 0, True)
        for number in range(2 * blocks):
            self.encode(samples(number, 8))
        assert self.cache.stats().memory_moves > 0, "it is tried again"
        self.generate([prompt(0, 60)])

    def resize_without_memory(
        self,
        row: list[int],
        same: Callable[[Any, int], None],
        prompt: Callable[..., list[int]],
        samples: Callable[..., Any],
    ) -> None:
        """A resize for which there is no memory changes nothing, also for an open sequence; a later one succeeds.

        Args:
            row: the sequence's tokens, 14 at least.
            same: asserts that logits are the ones that the model gives behind a token of ``row``.
            prompt: makes a prompt, of a seed and a length.
            samples: makes samples, of a seed and a number.
        """
        self.encode(samples(0, 16))
        self.generate([prompt(1, 60)])
        seq = self.cache.open(row)
        self.cache.step([seq], [row[:10]])
        blocks = self.cache.core.num_blocks
        for at, size in enumerate((blocks // 2, 2 * blocks, f"{self.memory // 2}B", f"{2 * self.memory}B"), 10):
            self.resize_in_vain(size)
            same(self.cache.step([seq], [row[at : at + 1]])[0], at)
        misses = self.cache.stats().miss_entries
        self.encode(samples(0, 16))
        assert self.cache.stats().miss_entries == misses
        seq.close()
        self.generate([prompt(1, 60)])
        self.memory //= 2
        self.cache.resize(memory=self.memory)
        self.generate([prompt(1, 60)])

    def array_bytes(self) -> int:
        """Bytes of the arrays of K and V, as the framework has them."""
        raise NotImplementedError

    def encode(self, x: Any) -> None:
        """Encode inside the cache; the answer is that of outside."""
        raise NotImplementedError

    def check(self) -> None:
        """The limit."""
        stats = self.cache.stats()
        assert stats.bytes <= self.memory
        assert stats.bytes == self.array_bytes() + stats.entry_bytes
        self.cache._budget.check_valid()
        self.cache.core.check_valid()
        self.cache.sites.entries.check_valid()
