"""An encoder's activations and a decoder's K/V in one cache, for either framework."""

from __future__ import annotations

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

    def array_bytes(self) -> int:
        """Bytes of the arrays of K and V, as the framework has them."""
        raise NotImplementedError

    def check(self) -> None:
        """The limit."""
        stats = self.cache.stats()
        assert stats.bytes <= self.memory
        assert stats.bytes == self.array_bytes() + stats.entry_bytes
        self.cache._budget.check_valid()
        self.cache.core.check_valid()
        self.cache.sites.entries.check_valid()
